"""Training: the one loop and what surrounds it. `loop`, `optim` and `checkpoint` need torch and safetensors alone.

loop         steps, clipping, NaN policy, signals, log lines
optim        parameter groups, Muon and AdamW, the learning rate of a step
checkpoint   atomic, verified, without pickle
objective    what a pretraining step computes from a batch
run          the run folder: who may write to it, what is recorded
events       TensorBoard event files without host names
panels       pictures of reconstructions
metrics      downstream scores
"""
