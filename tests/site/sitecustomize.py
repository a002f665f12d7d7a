"""In every process that a test starts: DeepSpeed does not compile, for a minute, what its tensor parallel inference alone uses."""

import importlib.util
import sys


class Finder:
    """Of the module that has the operator's builder."""

    @classmethod
    def find_spec(cls, name, path, target=None):
        if name != "deepspeed.ops.op_builder.cpu.comm":
            return None
        sys.meta_path.remove(cls)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            module.ShareMemCommBuilder.is_compatible = lambda self, verbose=False: False

        spec.loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder)
