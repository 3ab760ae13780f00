"""What any training here needs: the loop over steps and all that keeps a run alive. It knows no images and no text.

    job.py          what the loop is handed: start here
    loop.py         takes steps, validates, saves, goes on where a run stopped, skips what is not finite
    step.py         a train step with one gradient for each loss
    parallel.py     how devices share the work of a step: jit, pmap or shard_map
    batches.py      Grain: from examples to batches on the devices
    hosts.py        what one host does for all of them
    checkpoint.py   Orbax
    paths.py        folders of this machine, and of buckets
    workdir.py      which config and which run a working directory belongs to
    identity.py     what a config must not change in a working directory, and which teacher belongs to it
    lock.py         what keeps a second run out of it
    log.py          progress bar, metrics.jsonl, TensorBoard
    records.py      JSON files
    preemption.py   the signals that end a run
    settings.py     the fields of a config and the values that they may have
    command_line.py which config, which overrides, errors as one line
    process.py      the process of a command: its signals and its exit
    errors.py       the exception that becomes that line

`examples.distill` and `examples.language_model` are built on it.
"""
