"""The browser that opens the page of `finetune compare` in the tests: headless Chromium and axe-core, from npm.

`package-lock.json` pins both with checksums. npm unpacks them into the cache folder, once, and nothing is installed
into the system: the package has the libraries and fonts that Chromium needs. Neither root nor a display is needed."""
