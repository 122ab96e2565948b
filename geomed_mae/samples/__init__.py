"""Samples: windows cut from images, made into batches. Stateless: batch t is a function of (archive, recipe, seed, t).

buckets     images that can share a batch
crops       where a crop lies and how it is read; the generator that every random choice of a sample comes from
piece       stored numbers of a part of an image and how to read them; integers finds them in what readers give
memory      decoded images kept in memory, and the way to all others
store       decoded images kept on disk, for every process: grid cuts them, tiles is the file, folder the file system
augment     the symmetries that a modality allows
batch       the tensors of one step and what they mean; prefetch has the next one on its way to the device
dealing     which crops are read together, and which sample of which step each becomes; filling copies them there
loader      steps to batches, in this process or in workers, which may die, the same bits either way
"""
