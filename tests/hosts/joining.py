"""A rank that only joins the others, as launch/train.py does, and says so: started by launchers as that is."""

import argparse
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist

from tidal_dist.cluster.discovery import discover

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    discover(parser.parse_args().run)
    dist.init_process_group("gloo")
    total = torch.tensor(10.0 ** dist.get_rank())
    dist.all_reduce(total)
    text = f"{socket.gethostname()}: rank {dist.get_rank()} of {dist.get_world_size()}, sum {total:g}\n"
    os.write(1, text.encode())  # at once: launchers mix what ranks write in pieces
    dist.destroy_process_group()
