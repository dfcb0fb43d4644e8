"Builds the package from `settings.ini`, where name, version and requirements stand, for nbdev and for pip."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else settings["description"],
    long_description_content_type="text/markdown",
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    classifiers=["Intended Audience :: Science/Research", "Programming Language :: Python :: 3"],
    packages=find_packages(include=["mlan", "mlan.*"]),
    python_requires=f">={settings['min_python']},<{settings['below_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={extra: settings[f"{extra}_requirements"].split() for extra in ("dev", "tensorboard", "timm")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
