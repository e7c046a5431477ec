"""A stranger's first hour: the README's first commands, word for word and timed, where nothing of this machine helps.

    sudo python tools/first_hour.py                              # the last commit: clone, make setup, make run
    sudo python tools/first_hour.py --make setup run test        # and the tests
    sudo python tools/first_hour.py --uncommitted --notebooks notebooks/01_toy_data.ipynb

The commands run as `nobody`, with an empty HOME, no package cache and an empty environment, in a folder whose name has a
space and an umlaut; everything outside it is mounted read-only. Only the repository's address is answered by a local clone.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOBODY = 65534
# how pip reaches its index from here; nothing else of this environment is handed on
KEPT = re.compile(
    r"PIP_(INDEX_URL|EXTRA_INDEX_URL|FIND_LINKS|CONFIG_FILE|CERT|DEFAULT_TIMEOUT)|(?i:\w+_proxy)|SSL_CERT_\w+"
)
# as root in a mount namespace of its own: all file systems become read-only, then the one folder writable again
ISOLATED = r"""set -e
for place in $(cut -d ' ' -f 2 /proc/self/mounts | grep -vE '^/(proc|sys|dev)(/|$)' | sort -u); do
    mount -o remount,bind,ro "$(printf %b "$place")"
done
mount --bind . .
cd "$PWD"
mount -o remount,bind,rw .
exec setpriv --reuid=65534 --regid=65534 --clear-groups env -i "$@"
"""


def readme_commands() -> list[str]:
    """The lines of the README's first bash block."""
    return re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S).group(1).splitlines()


def clone(place: Path, uncommitted: bool) -> None:
    """A bare clone of the last commit, with the files that are not committed yet as one more if asked for."""
    subprocess.run(["git", "clone", "-q", "--bare", ROOT, place], check=True)
    if uncommitted:
        git = ["git", f"--git-dir={place}", f"--work-tree={ROOT}", "-c", "user.name=nobody", "-c", "user.email=nobody"]
        for words in ("read-tree HEAD", "config core.bare false", "add -A", "commit -q --allow-empty -m uncommitted"):
            subprocess.run([*git, *words.split()], check=True, cwd=ROOT)
        subprocess.run(["git", f"--git-dir={place}", "config", "core.bare", "true"], check=True)


def script(commands: list[str]) -> str:
    """The commands in one shell, up to the first that fails; seconds, exit code and line of each go to `facts`."""
    lines = ['facts="$PWD/facts"', '[ -w /var/tmp ] && echo "not isolated: /var/tmp can be written to" && exit 3']
    for command in commands:
        told = shlex.quote(command)
        lines += [f"printf '\\n$ %s\\n' {told}", "SECONDS=0", command, "code=$?"]
        lines += [f"printf '%s\\t%s\\t%s\\n' $SECONDS $code {told} >> \"$facts\"", "[ $code -eq 0 ] || exit $code"]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", nargs="*", default=["setup", "run"], help="the README's make targets to run")
    parser.add_argument("--notebooks", help="only these, instead of all (a pattern)")
    parser.add_argument("--uncommitted", action="store_true", help="with the changes that are not committed")
    parser.add_argument("--place", type=Path, default=Path(tempfile.gettempdir()), help="where the folder is made")
    parser.add_argument("--path", default="/usr/local/bin:/usr/bin:/bin", help="PATH of the stranger")
    parser.add_argument("--keep", action="store_true", help="leave the folder there")
    wanted = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("read-only mounts need root: sudo python tools/first_hour.py")
    lines = readme_commands()
    commands = [line for line in lines if not (found := re.match(r"make (\w+)", line)) or found[1] in wanted.make]
    if missing := set(wanted.make) - {line.split()[1] for line in lines if line.startswith("make ")}:
        parser.error(f"the README's first block has no make {', '.join(missing)}")
    address = re.search(r"git clone (?:--\S+ \d+ )?(\S+)", "\n".join(commands)).group(1)

    top = Path(tempfile.mkdtemp(prefix="first-hour-", dir=wanted.place))
    top.chmod(0o755)
    folder = top / "Vision DiffMask für alle"
    for name in ("home", "tmp"):
        (folder / name).mkdir(parents=True)
    clone(folder / "origin.git", wanted.uncommitted)
    (folder / "commands.sh").write_text(script(commands), encoding="utf-8")
    subprocess.run(["chown", "-R", f"{NOBODY}:{NOBODY}", folder], check=True)
    environment = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    environment |= {
        "PATH": wanted.path, "LANG": "C.UTF-8", "HOME": f"{folder}/home", "TMPDIR": f"{folder}/tmp", "PIP_NO_CACHE_DIR": "1",
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.{folder}/origin.git.insteadOf", "GIT_CONFIG_VALUE_0": address,
    }  # fmt: skip
    if wanted.notebooks:
        environment["MAKEFLAGS"] = f"-- NOTEBOOKS={wanted.notebooks}"
    settings = [f"{name}={value}" for name, value in environment.items()]
    command = ["unshare", "--mount", "bash", "-c", ISOLATED, "bash", *settings, "bash", "commands.sh"]
    start = time.perf_counter()
    code = subprocess.run(command, cwd=folder).returncode
    print(f"\n{'seconds':>7}  {'exit':>4}  command of the README")
    facts = folder / "facts"
    for line in facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []:
        seconds, exit_code, text = line.split("\t")
        print(f"{seconds:>7}  {exit_code:>4}  {text}")
    print(
        f"{time.perf_counter() - start:7.0f}  {code:>4}  together; left in HOME: {sorted(p.name for p in (folder / 'home').iterdir())}"
    )
    if wanted.keep:
        print(f"kept: {folder}")
    else:
        shutil.rmtree(top)
    return code


if __name__ == "__main__":
    sys.exit(main())
