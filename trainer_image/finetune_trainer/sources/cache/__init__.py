"""The cache of model files on a volume that the pods of many jobs share (`storage.cache.claimName`): what lies on the
volume, whose turn it is to fetch a file, and the fetch through the cache. Where the files come from belongs to the
folder above, and what the files must contain is stated by their sources.
"""
