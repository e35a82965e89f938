"""List the recipes of the package, print one, or copy it to a file of your own. --config takes their names.

``fcmae pretrain --config small`` takes pretrain_small. A copy may be changed, or build on the recipe:
  config: pretrain_small
  epochs: 50
Examples:
  fcmae recipes
  fcmae recipes pretrain_small
  fcmae recipes pretrain_small --output mine.yaml
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from convnextv2.commands import _cli
from convnextv2.outputs import Kind, check_output, output_path, output_text
from convnextv2.recipes import about, recipes, why_no_recipe

RECIPE = Kind("a recipe", (".yaml", ".yml"), lambda path: False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, list or copy."""
    parser = _cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe to print; default: list all")
    parser.add_argument("--output", type=output_path, help="YAML file to write it to; default: standard output")
    parser.add_argument("--overwrite", action="store_true", help="let the output replace a file")
    options = parser.parse_args(arguments)
    if options.name is None:
        if options.output is not None:
            parser.error("--output: name the recipe to copy")
        width = max(map(len, recipes()))
        for name, path in recipes().items():
            _cli.say(f"{name:<{width}}  {about(path)}")
        return
    if options.name not in recipes():
        parser.error(why_no_recipe(options.name))
    text = recipes()[options.name].read_text(encoding="utf-8")
    if options.output is None:
        _cli.say(text.rstrip("\n"))
        return
    check_output(options.output, RECIPE, overwrite=options.overwrite)
    with output_text(options.output) as file:
        file.write(text)
