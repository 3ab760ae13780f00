"""How many JPEG images of ImageNet's size does a core read, decode, crop and resize in a second, and what stops it?

    pip install opencv-python-headless imagecodecs kornia_rs  # to compare their decoders; left out where they are not
    JAX_PLATFORMS=cpu python -m benchmarks.input_pipeline

makes 2,000 JPEG files and prints, after a minute and a half on two cores of an AMD EPYC,

    2000 JPEG files of 92 kB on average

    one core                       ms per image   share   images/s
    all of it, in training                1.311    100%        763
    - read from ArrayRecord               0.045      3%     22,311
    - decode (simplejpeg)                 0.820     63%      1,219
    - crop, resize, flip (Pillow)         0.516     39%      1,938
    all of it, in evaluation              1.833    140%        546

    decoding alone                 ms per image   ratio
    simplejpeg                            0.863    1.00
    Pillow                                1.028    1.19
    OpenCV                                0.875    1.01
    imagecodecs                           0.859    1.00
    kornia_rs                             0.860    1.00

    the pipeline, 2 cores          images/s   for each core
    2 threads of one process          1,219             610
    1 worker processes                  580             290
    2 worker processes                  912             456

(stages are timed apart, so their shares do not add up to 100%). What stops it is arithmetic: decoding takes three fifths
of the time, resizing two fifths, and all decoders but Pillow's are the same libjpeg-turbo. Threads keep both cores busy,
since decoding and resizing let other threads in; worker processes hand over every batch by a copy, which costs more than it
saves on two cores. It takes some 2,000 images for the start of the processes not to show.
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
import simplejpeg
import tensorflow_datasets as tfds
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.jpeg_images import JpegImages
from examples.distill import data, images
from examples.distill.configs.imagenet_r50_mobilenetv1 import get_config

BATCH = 64
WARM_UP = 4  # batches: until worker processes have started and what is prefetched is used up
CROP = 224
SAMPLE = 300  # images that the stages are timed with


def prepare(folder, count):
    builder = JpegImages(data_dir=folder, file_format="array_record")
    builder.count = count
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        builder.download_and_prepare()
    return builder.as_data_source(split="train", decoders={"image": tfds.decode.SkipDecoding()})


def decoders():
    """Returns what decodes JPEG files to RGB arrays, by package: ours, and others where they are installed."""
    found = {"simplejpeg": simplejpeg.decode_jpeg, "Pillow": lambda file: np.asarray(Image.open(io.BytesIO(file)))}
    with contextlib.suppress(ImportError):
        import cv2

        found["OpenCV"] = lambda file: cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
    with contextlib.suppress(ImportError):
        import imagecodecs

        found["imagecodecs"] = imagecodecs.jpeg8_decode
    with contextlib.suppress(ImportError):
        import kornia_rs

        found["kornia_rs"] = lambda file: kornia_rs.io.decode_image_jpegturbo(file, "rgb")
    return found


def medians(tasks, rounds):
    """Returns milliseconds of one core per image, by task: medians of rounds in which the tasks take turns."""
    times = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            started = time.process_time()
            count = len(task())
            times[name].append(1e3 * (time.process_time() - started) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def stages(source, rounds):
    """Returns the milliseconds of the pipeline's stages, and those of decoders."""
    indices = range(min(len(source), SAMPLE))
    files = [source[i]["image"] for i in indices]
    decoded = [images.decode(file, 3) for file in files]
    rng = np.random.default_rng(0)

    def augment(image):
        return images.resized_crop_flip(image, CROP, rng)

    def view(image):
        return images.resize_center_crop(image, CROP)

    by_stage = {
        "all of it, in training": lambda: [augment(images.decode(source[i]["image"], 3)) for i in indices],
        "- read from ArrayRecord": lambda: [source[i]["image"] for i in indices],
        "- decode (simplejpeg)": lambda: [images.decode(file, 3) for file in files],
        "- crop, resize, flip (Pillow)": lambda: [augment(image) for image in decoded],
        "all of it, in evaluation": lambda: [view(images.decode(source[i]["image"], 3)) for i in indices],
    }
    by_decoder = {name: lambda decode=decode: [decode(file) for file in files] for name, decode in decoders().items()}
    return medians(by_stage, rounds), medians(by_decoder, rounds)


def pipelines(folder, worker_counts, rounds):
    """Returns images per second, as the trainer gets them, by number of worker processes; 0 stands for threads."""
    config = get_config().dataset
    config.update({"name": "jpeg_images", "data_dir": str(folder), "validation": "train", "test": "train"})
    config.split_sizes = ConfigDict()  # those of ImageNet, which this is not
    dataset = data.load(config)
    rates = {count: [] for count in worker_counts}
    for _ in range(rounds):
        for count in worker_counts:
            with data.train_batches(dataset._replace(workers=count), BATCH, seed=0, epochs=2) as batches:
                for _ in range(WARM_UP):
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
        by_stage, by_decoder = stages(source, args.rounds)
        rates = pipelines(folder, (0, 1, os.cpu_count()), args.rounds)

    print(f"{len(source)} JPEG files of {kilobytes:.0f} kB on average\n")
    whole = by_stage["all of it, in training"]
    print(f"{'one core':30} ms per image   share   images/s")
    for name, value in by_stage.items():
        print(f"{name:30} {value:12.3f} {value / whole:7.0%} {1e3 / value:10,.0f}")
    print(f"\n{'decoding alone':30} ms per image   ratio")
    for name, value in by_decoder.items():
        print(f"{name:30} {value:12.3f} {value / by_decoder['simplejpeg']:7.2f}")
    print(f"\n{'the pipeline, ' + str(os.cpu_count()) + ' cores':30} images/s   for each core")
    for count, rate in rates.items():
        name = f"{count} worker processes" if count else f"{os.cpu_count()} threads of one process"
        print(f"{name:30} {rate:8,.0f} {rate / os.cpu_count():15,.0f}")
    if args.json:
        figures = {"kilobytes": kilobytes, "milliseconds": by_stage, "decoders": by_decoder, "images_per_second": rates}
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
