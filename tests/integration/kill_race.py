"""Two workers race on the same shards and are killed at random moments, again and again.

Run by test_kill_race.py, in a process of its own: forking needs one without threads.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from data_pipeline.locks import clear_leftovers
from data_pipeline.planning import plan
from data_pipeline.runner import PipelineConfig, process_shard
from data_pipeline.segmenters.box import BoxSegmenter
from data_pipeline.sources.grit import GritSource
from data_pipeline.sources.storage import find_inputs

MOST_S = 0.06  # a shard of these takes about half of it


def work(inputs: list[str], output: Path, config: PipelineConfig, seed: int) -> None:
    clear_leftovers(output, grace_s=0.5)
    tasks = plan(inputs, output, config)
    random.Random(seed).shuffle(tasks)
    for task in tasks:
        process_shard(task, output, config)


def start(*arguments: object) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(*arguments)  # type: ignore[arg-type]
        except BaseException as error:  # noqa: BLE001 - nothing but a kill may end a worker
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def main(pattern: str, folder: str, layout: str, kills: int) -> None:
    """Kill workers until enough died at work; a new folder is begun when one is complete."""
    rng = random.Random(0)
    config = PipelineConfig(GritSource(), BoxSegmenter(), layout=layout)  # type: ignore[arg-type]
    inputs = find_inputs(pattern)
    killed, failed, folders, rounds = 0, 0, [Path(folder) / "0"], 0
    while killed < kills:
        rounds += 1
        if folders[-1].exists() and not plan(inputs, folders[-1], config):
            folders.append(Path(folder) / str(len(folders)))
        children = [start(inputs, folders[-1], config, 2 * rounds + i) for i in range(2)]
        for child in children:
            time.sleep(rng.uniform(0, MOST_S))
            os.kill(child, signal.SIGKILL)
        for child in children:
            status = os.waitpid(child, 0)[1]
            killed += os.WIFSIGNALED(status)
            failed += os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0
    for output in folders:
        time.sleep(0.6)
        work(inputs, output, config, seed=0)
        clear_leftovers(output, grace_s=0)
    result = {"killed": killed, "failed": failed, "folders": list(map(str, folders))}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
