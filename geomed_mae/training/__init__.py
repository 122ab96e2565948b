"""Training: the one loop and what surrounds it. `loop`, `optim` and `checkpoint` need torch and safetensors alone.

loop         the loop: data, gradients, update, log, save
learner      what it changes: a module, its optimisers, the average of its weights
optim        parameter groups, Muon and AdamW, the learning rate of a step
muon         Muon by several processes
average      the moving average of the weights
distributed  the processes of a run, and what they tell one another
parallel     one module in several processes: replicated, in parts, compiled
checkpoint   atomic, verified, without pickle
signals      being told to stop
progress     counts, means and the bar that a user sees
objective    what a pretraining step computes from a batch
begin        contract and first weights of a run
plan         what a dry run tells
run          the run folder: who may write to it, what is recorded
events       TensorBoard event files without host names
observers    watching a run: live panels, the live probe, what the report needs
pictures     from crops to the planes that a panel shows
panels       pictures of reconstructions
live_files   how live panels are called, and which are kept
task, draws  the labelled images of a fine-tuning run and their parts; which groups and images are drawn
downstream   the model that a fine-tuning run starts with, and that of its twin
tuning, early                 one fine-tuning run; early stopping
study, study_files, comparison    several seeds and twins; their folders; what they found
probing      features against shares of classes: a ridge in closed form, for the verb `probe` and the live probe
logistic, knn                 features against classes of images; the nearest neighbours, for both
probe_parts, probe_features   which images a probe learns from and is scored on; the encoder's features and its floors
dense_probe, image_probe      the probe of label maps, and of classes of images
probe_verdict                 the encoder against its best floor, and with few labels
probe_online, probe_windows   the live probe, and what it looks at
mlflow_log   the same numbers for MLflow, optional
"""
