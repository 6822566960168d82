"""A folder of this machine as the store of a job's runs, so that a training needs no object store. `storage/root.py`
opens it where the run file names a folder (`storage.folder`).

The layout is that of the object store: the buckets are folders, and an object `runs/000001.json` is the file of this
path. Code about the layout itself belongs into the package above, which does not know where its objects lie.
"""
