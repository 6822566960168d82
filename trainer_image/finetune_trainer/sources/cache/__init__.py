"""The cache of model files on a volume that the pods of many jobs share (`storage.cache.claimName`). `cache_folder.py`
reads and writes the volume, and decides which pod may fetch a file. `cached_fetch.py` fetches a model through the
cache.

Code that downloads files from their sources, and code that determines which content a file must have, belongs in
`sources/`.
"""
