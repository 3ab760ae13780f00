"""One experiment per file, each with `get_config()`; here are the fields that all of them have, and what each means."""

from ml_collections import ConfigDict


def default() -> ConfigDict:
    """Every field of a config; `None` where the config itself must choose."""
    config = ConfigDict()
    config.seed = 0
    config.method = "dot"  # one or more of those that --help lists, and of what is registered, with commas between
    config.epochs = None
    config.batch_size = None  # over all devices; the images that fill no batch are left out of an epoch
    config.eval_batch_size = None
    config.dtype = "float32"  # what networks compute in, or bfloat16; parameters, losses and momenta are float32
    config.parallel = "jit"  # how devices share the work: jit, pmap or shard_map; see parallel.py
    config.devices = 0  # how many to use; 0: all
    config.shard_params = False  # with jit: divide large parameters and momenta among the devices
    config.gradient_metrics = True  # log the gradients' norms and cosine, at one more backward pass for ce and kd
    config.diagnostics = False  # log more, with gradient_metrics: see trainer/diagnostics.py
    config.diagnostics_by = "all"  # or layer: cosines, conflicts, norms and updates of each layer as well
    config.checkpoint_every_steps = None  # besides every epoch that validates better than all before, and the last
    config.keep_checkpoints = 2  # the latest, besides the best
    config.max_consecutive_skips = 10  # after so many steps in a row that were not finite, and skipped, training stops
    config.report_note = ""  # what else a reader should know of this experiment; printed below the table

    config.dataset = ConfigDict()
    config.dataset.name = None  # of a registered dataset (see sources.py) or a TFDS builder
    config.dataset.train = "train"  # splits, in the syntax of TFDS
    config.dataset.validation = None  # followed during training
    config.dataset.test = None  # evaluated once, after training
    config.dataset.image_size = None  # pixels on a side of what the networks see
    config.dataset.preprocessing = None  # none, cifar, fashion_mnist, tiny_imagenet, imagenet, or a registered one
    config.dataset.mean = None  # per channel, in units of the stored pixels
    config.dataset.std = None
    config.dataset.in_memory = False  # decode once and keep; for data that fit
    config.dataset.workers = 0  # processes that decode and augment, at most one per core; 0: threads of this process
    config.dataset.data_dir = ""  # the folder of the data; empty: for TFDS ~/tensorflow_datasets
    config.dataset.prepare = False  # build the dataset if it is not there yet, downloading it if need be
    config.dataset.synthetic = False  # random images of the same shapes, for benchmarks: nothing is read or decoded
    config.dataset.split_sizes = ConfigDict()  # images of each TFDS split, when complete; synthetic data have as many

    config.teacher = ConfigDict()
    config.teacher.model = None  # name and options for models.build
    config.teacher.checkpoint = ""  # a folder made by import_teacher, or WORKDIR/METHOD of a run; or WORKDIR/teacher
    config.teacher.train = False  # train it in WORKDIR/teacher, with cross-entropy, if it is not there
    config.teacher.epochs = None
    config.teacher.optimizer = optimizer()

    config.student = ConfigDict()
    config.student.model = None

    config.distillation = ConfigDict()
    config.distillation.temperature = None  # of every method
    config.distillation.task_weight = None  # of the methods that are trained on the plain distillation loss
    config.distillation.kd_weight = None

    config.dkd = ConfigDict()  # dkd and dkd_dot: task_weight x cross-entropy + alpha x TCKD + beta x NCKD
    config.dkd.task_weight = 1.0
    config.dkd.alpha = 1.0  # of the target class against all others
    config.dkd.beta = 8.0  # of the distribution over the others; published from 0.5 to 12, with the networks
    config.dkd.warmup_epochs = 20  # in the n-th of these epochs, TCKD and NCKD have n / warmup_epochs of their weights

    config.deepkd = ConfigDict()  # deepkd: three losses, each with a momentum of `optimizer.momentum` + delta_...
    config.deepkd.task_weight = 0.1
    config.deepkd.target_weight = 1.0  # of TCKD
    config.deepkd.non_target_weight = 1.0  # of (1 - q) NCKD, q the teacher's probability of the target class
    config.deepkd.delta_task = 0.075
    config.deepkd.delta_target = -0.075
    config.deepkd.delta_non_target = 0.075
    config.deepkd.top_k_fraction = 0.05  # NCKD begins on this part of the classes, the teacher's likeliest; 1: on all
    config.deepkd.top_k_phases = (0.25, 0.5)  # parts of all epochs: up to the first it stays so, from the second on all

    config.crd = ConfigDict()  # crd and crd_dot: task_weight x cross-entropy + crd_weight x the contrast of features
    config.crd.task_weight = 1.0
    config.crd.crd_weight = 0.8
    config.crd.dim = 128  # the width to which the features of student and teacher are projected
    config.crd.negatives = 16384  # images of other classes that each is told from; drawn twice where there are fewer
    config.crd.temperature = 0.07  # by which the products of two embeddings are divided
    config.crd.momentum = 0.5  # how much of an image's embedding in the memory stays when it is seen again

    config.sampling = ConfigDict()  # of the students' gradients, below their exact cost; see trainer/sampling.py
    config.sampling.form = "none"  # or losses, alternating, difference, examples
    config.sampling.period = 2  # k: the KD loss, or the difference, at every k-th step, or on every k-th image

    config.optimizer = optimizer()
    config.optimizer.delta = None  # DOT's momenta are momentum - delta (task) and momentum + delta (KD)
    config.optimizer.delta_warmup_epochs = 0  # delta, and DeepKD's, rise from 0 within these epochs, and each step
    return config


def set_networks(config: ConfigDict, teacher: str, student: str) -> ConfigDict:
    """Sets both networks; the teacher, should it be trained here, has the recipe that the config has so far."""
    config.teacher.model = ConfigDict({"name": teacher})
    config.teacher.epochs = config.epochs
    config.teacher.optimizer.update({field: config.optimizer[field] for field in config.teacher.optimizer})
    config.student.model = ConfigDict({"name": student})
    return config


def optimizer() -> ConfigDict:
    config = ConfigDict()
    config.name = "sgd"  # or adamw, or muon
    config.learning_rate = None
    config.momentum = 0.9  # for adamw, and where muon has Adam, b1
    config.b2 = 0.999  # adamw and muon: the decay rate of the second moment
    config.eps = 1e-8  # adamw and muon: added to the root of the second moment
    config.weight_decay = None  # sgd: coupled L2; adamw and muon: decoupled, multiplied by the learning rate
    config.decay_mask = ""  # what decays: all, or kernels alone; empty: all for sgd, kernels for the others
    config.schedule = "steps"  # or cosine: down to 0 at the end of the last epoch
    config.warmup_epochs = 0  # the learning rate rises from 0 within these epochs, and each step
    config.drop_epochs = ()  # steps: after each of these epochs the learning rate is multiplied by ...
    config.drop_factor = 0.1  # ... this factor
    return config
