"""Training, evaluation and prediction: what `pyext train`, `pyext eval`, `pyext predict` and `pyext demo` run.

The packages of the extra `train`, and why these:

    lightning-fabric  devices, bfloat16 autocast and DDP under torchrun, without taking over the loop
    torchvision       the CIFAR archives, image folders, random crops and AutoAugment that others train with
    scikit-learn      bundles 1,797 real images of digits, so that the demo needs no download
    pillow            reads image files
    rich              a progress bar and tables that also behave where stdout is a file
    safetensors       exported weights that run no code when they are opened
    matplotlib        the demo's plot

Each is imported where it is needed and a missing one is named in one sentence. The command line is argparse's, because
it comes with Python. CSV is always written, TensorBoard's events when asked for (`pip install tensorboard`).
"""
