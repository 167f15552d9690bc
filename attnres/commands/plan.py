"""What a run needs on a cluster, before it starts."""

from attnres.commands.hydra_door import plan

if __name__ == "__main__":
    plan()
