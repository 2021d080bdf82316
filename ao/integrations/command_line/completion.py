"""`ao completion`: a script that makes a shell complete commands, options, formats and files."""

from __future__ import annotations

import argparse

from .format_names import FORMATS, RECIPES

NAME = "completion"
HELP = "print a script that makes your shell complete `ao`"
DETAILS = """  bash   eval "$(ao completion bash)"                       in ~/.bashrc
  zsh    eval "$(ao completion zsh)"                        in ~/.zshrc, after compinit
  fish   ao completion fish > ~/.config/fish/completions/ao.fish"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "zsh", "fish"])


def run(args: argparse.Namespace) -> int:
    from .program import parser

    print(script(args.shell, parser()))
    return 0


def script(shell: str, parser: argparse.ArgumentParser) -> str:
    """The script for "bash", "zsh" or "fish", from the commands and options of `parser`."""
    commands = {name: (p.description or "", _options(p)) for name, p in _commands(parser).items()}
    formats, recipes = " ".join(FORMATS), " ".join(RECIPES)
    if shell == "fish":
        lines = ["complete -c ao -n __fish_use_subcommand -f"]
        for name, (about, options) in commands.items():
            lines.append(f"complete -c ao -n __fish_use_subcommand -a {name} -d {_quoted(about)}")
            for option, help_text in options.items():
                words = formats if option in ("--config", "--configs") else recipes if option == "--recipe" else ""
                values = f" -x -a '{words}'" if words else ""
                here = f"-n '__fish_seen_subcommand_from {name}'"
                lines.append(f"complete -c ao {here} -l {option.lstrip('-')} -d {_quoted(help_text)}{values}")
        return "\n".join(lines)
    cases = "\n".join(
        f"        {name}) options={_quoted(' '.join(options))} ;;" for name, (_, options) in commands.items()
    )
    first = "autoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    return f"""{first}_ao() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} options=
    if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W {_quoted(" ".join(commands))} -- "$word")); return; fi
    case $before in --config|--configs) COMPREPLY=($(compgen -W {_quoted(formats)} -- "$word")); return ;;
        --recipe) COMPREPLY=($(compgen -W {_quoted(recipes)} -- "$word")); return ;; esac
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    case $word in
        -*) COMPREPLY=($(compgen -W "$options" -- "$word")) ;;
        *) COMPREPLY=($(compgen -f -- "$word")) ;;
    esac
}}
complete -o filenames -F _ao ao"""


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    actions = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def _options(parser: argparse.ArgumentParser) -> dict[str, str]:
    return {
        option: (action.help or "").replace("%%", "%")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
