"""How the verbs that write many outputs do it: blocks on disk, formats, what is finished, what failed."""
