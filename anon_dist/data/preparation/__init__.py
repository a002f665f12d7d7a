"""From text files to a prepared folder."""
