"""How many JPEG images of ImageNet's size does a core read, decode, crop and resize in a second, and what stops it?

    python -m benchmarks.input_pipeline

TABLE
"""

import argparse
import contextlib
import io
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from benchmarks.jpeg_images import JpegImages
from examples.distill import data, images
from examples.distill.configs.imagenet_r50_mobilenetv1 import get_config

BATCH = 64
CROP = 224
SAMPLE = 300  # images that the stages are timed with


def prepare(folder, count):
    builder = JpegImages(data_dir=folder, file_format="array_record")
    builder.count = count
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})


def by_pillow(encoded):
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def stages(source, rounds):
    """Returns milliseconds of one core per image, by stage: medians of rounds in which the stages take turns."""
    indices = range(min(len(source), SAMPLE))
    files = [source[i]["image"] for i in indices]
    decoded = [images.decode(file, 3) for file in files]
    rng = np.random.default_rng(0)

    def augment(image):
        return images.resized_crop_flip(image, CROP, rng)

    cropped = [augment(image) for image in decoded]
    tasks = {
        "all of it, in training": lambda: [augment(images.decode(source[i]["image"], 3)) for i in indices],
        "read from ArrayRecord": lambda: [source[i]["image"] for i in indices],
        "decode (simplejpeg)": lambda: [images.decode(file, 3) for file in files],
        "crop, resize, flip (Pillow)": lambda: [augment(image) for image in decoded],
        "copy into a batch": lambda: [np.stack(cropped[i : i + BATCH]) for i in range(0, len(cropped), BATCH)],
        "all of it, decoded by Pillow": lambda: [augment(by_pillow(source[i]["image"])) for i in indices],
        "all of it, in evaluation": lambda: [
            images.resize_center_crop(images.decode(source[i]["image"], 3), CROP) for i in indices
        ],
    }
    times = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.process_time()
            task()
            times[name].append(1e3 * (time.process_time() - started) / len(indices))
    return {name: statistics.median(values) for name, values in times.items()}


def pipelines(folder, worker_counts, rounds):
    """Returns images per second, as the trainer gets them, by number of worker processes; 0 stands for threads."""
    config = get_config().dataset
    config.update({"name": "jpeg_images", "data_dir": str(folder), "validation": "train", "test": "train"})
    dataset = data.load(config)
    rates = {count: [] for count in worker_counts}
    for _ in range(rounds):
        for count in worker_counts:
            with data.train_batches(dataset._replace(workers=count), BATCH, seed=0, epochs=2) as batches:
                for _ in range(4):  # until worker processes have started and what is prefetched is used up
                    next(batches)
                started = time.perf_counter()
                seen = sum(len(batch["label"]) for batch in batches)
                rates[count].append(seen / (time.perf_counter() - started))
    return {count: statistics.median(values) for count, values in rates.items()}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="how many JPEG files to make")
    parser.add_argument("--rounds", type=int, default=5, help="how often to time each; medians are shown")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures to this file")
    args = parser.parse_args(argv)

    with tempfile.TemporaryDirectory() as folder:
        source = prepare(folder, args.images)
        kilobytes = statistics.mean(len(source[i]["image"]) for i in range(len(source))) / 1e3
        by_stage = stages(source, args.rounds)
        rates = pipelines(folder, (0, 1, os.cpu_count()), args.rounds)

    print(f"{len(source)} JPEG files of {kilobytes:.0f} kB on average\n")
    whole = by_stage["all of it, in training"]
    print(f"{'one core':30} ms per image   share   images/s")
    for name, value in by_stage.items():
        print(f"{name:30} {value:12.3f} {value / whole:7.0%} {1e3 / value:10.0f}")
    print(f"\n{'the pipeline, ' + str(os.cpu_count()) + ' cores':30} images/s")
    for count, rate in rates.items():
        name = f"{count} worker processes" if count else f"{os.cpu_count()} threads of one process"
        print(f"{name:30} {rate:8.0f}")
    if args.json:
        figures = {"kilobytes": kilobytes, "milliseconds": by_stage, "images_per_second": rates}
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
