"""`python -m examples.language_model`."""

from examples.trainer import process

if __name__ == "__main__":
    process.run("examples.language_model.command_line")
