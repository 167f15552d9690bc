"""Train a Block AttnRes Qwen3 or its vanilla baseline: `python train.py --help`."""

from attnres.commands.train import main

if __name__ == "__main__":
    main()
