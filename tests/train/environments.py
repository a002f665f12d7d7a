"""What accelerate's launcher gives to each rank, by its configuration; `test_configs.py` runs this, in one process for all.

environments.py FOLDER FILE:RANKS …   leaves the variables of rank r in FOLDER/FILE/r, as `env -0` prints them
"""

import sys
from pathlib import Path

from accelerate.commands.launch import launch_command, launch_command_parser

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"

if __name__ == "__main__":
    for file, ranks in (argument.split(":") for argument in sys.argv[2:]):
        folder = Path(sys.argv[1]) / file
        folder.mkdir()
        command = ["--config_file", str(CONFIGS / f"{file}.yaml"), "--num_processes", ranks]
        script = ["--no_python", "sh", "-c", 'env -0 > "$0/$RANK"', str(folder)]
        launch_command(launch_command_parser().parse_args([*command, *script]))
