"""What an optimizer's state means: from AdamW to Anon and back, bases, schedules of the learning rate."""
