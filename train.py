"""Train a Block AttnRes Qwen3 or its vanilla baseline: `python train.py --help`."""

from attnres.commands.hydra_door import train

if __name__ == "__main__":
    train()
