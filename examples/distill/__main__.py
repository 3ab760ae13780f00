"""`python -m examples.distill`."""

from examples.trainer import process

if __name__ == "__main__":
    process.run("examples.distill.command_line")
