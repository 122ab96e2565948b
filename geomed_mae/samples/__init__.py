"""Samples: windows cut from images, made into batches. Stateless: batch t is a function of (archive, recipe, seed, t).

buckets     images that can share a batch
crops       where a crop lies and how it is read; the generator that every random choice of a sample comes from
augment     the symmetries that a modality allows
batch       the tensors of one step and what they mean
loader      steps to batches, in this process or in workers, the same bits either way
"""
