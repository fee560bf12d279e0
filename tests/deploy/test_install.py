"""deploy/install.sh, rehearsed below a folder: what it writes, keeps, and would run."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from tests.deploy.test_units import environment, of_service
from tests.servers import ROOT, WAIT_S, started

SCRIPT = ROOT / "deploy" / "install.sh"
SCRIPTS = [
    SCRIPT,
    ROOT / "deploy" / "transformers-api",
    ROOT / "scripts" / "install_test_tools.sh",
    ROOT / "scripts" / "lock.sh",
    ROOT / ".ci" / "run",
]
SHELLCHECK = shutil.which("shellcheck")
NAME = "llm.example.net"


def install(root, *options):
    """(lines that it says, exit status)."""
    done = subprocess.run(
        [SCRIPT, "--rehearse", root, *options], capture_output=True, text=True, timeout=WAIT_S
    )
    return (done.stdout + done.stderr).splitlines(), done.returncode


def installed(root, *options):
    lines, status = install(root, *options)
    assert status == 0, lines
    return lines


def files(root):
    """Every file with its mode, contents and time, and where links lead."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_symlink():
            found[path] = path.readlink()
        elif path.is_file():
            found[path] = (path.stat().st_mode, path.stat().st_mtime_ns, path.read_bytes())
    return found


@pytest.fixture
def root(tmp_path):
    installed(tmp_path, "--domain", NAME)
    return tmp_path


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is needed: scripts/install_test_tools.sh")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script):
    done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 0, done.stdout


def test_a_second_time_changes_nothing_and_restarts_nothing(root):
    before = files(root)
    lines = installed(root)
    assert files(root) == before
    assert not [line for line in lines if line.startswith(("writing", "making"))]
    assert not [line for line in lines if "systemctl restart" in line]


def test_nothing_outside_the_folder_is_touched_in_a_rehearsal(tmp_path):
    lines = installed(tmp_path, "--domain", NAME)
    commands = [shlex.split(line.removeprefix("would run: ")) for line in lines if "would" in line]
    assert {command[0] for command in commands} >= {"useradd", "chown", "systemctl", "nginx"}
    assert [line for line in lines if "systemctl restart transformers-api.service" in line]


def test_packages_are_installed_by_their_hashes_into_a_folder_of_their_own(tmp_path):
    lines = installed(tmp_path)
    pip = [line for line in lines if " -m pip " in line]
    assert ["deploy/torch-cpu.lock" in line for line in pip] == [True, False]
    for line in pip:
        assert "--no-deps --require-hashes --only-binary :all:" in line
        assert "would run: /opt/transformers-api/releases/" in line


def test_secrets_are_readable_by_root_and_keys_by_the_service(root):
    etc = root / "etc" / "transformers-api"
    modes = {name: (etc / name).stat().st_mode & 0o777 for name in ("env", "api-keys", "hf-token")}
    assert modes == {"env": 0o640, "api-keys": 0o640, "hf-token": 0o600}
    assert etc.stat().st_mode & 0o777 == 0o750
    assert (etc / "tls").stat().st_mode & 0o777 == 0o700


def test_settings_and_keys_are_kept(root):
    etc = root / "etc" / "transformers-api"
    for name in ("env", "api-keys", "hf-token"):
        (etc / name).write_text("mine\n")
    installed(root)
    assert {(etc / name).read_text() for name in ("env", "api-keys", "hf-token")} == {"mine\n"}


def test_nginx_serves_the_name_and_its_old_configuration_is_kept(tmp_path):
    file = tmp_path / "etc" / "nginx" / "nginx.conf"
    file.parent.mkdir(parents=True)
    file.write_text("of Debian\n")
    installed(tmp_path, "--domain", NAME)
    assert file.read_text().count(f"server_name {NAME};") == 2
    assert "example.org" not in file.read_text()
    assert file.with_name("nginx.conf.before").read_text() == "of Debian\n"
    installed(tmp_path)
    assert file.with_name("nginx.conf.before").read_text() == "of Debian\n"


def test_an_edited_nginx_configuration_stays_and_the_new_one_lies_beside(root):
    file = root / "etc" / "nginx" / "nginx.conf"
    edited = file.read_text() + "# mine\n"
    file.write_text(edited)
    installed(root)
    assert not file.with_name("nginx.conf.new").exists()  # nothing new to see
    lines = installed(root, "--domain", "other.example.net")
    assert "/etc/nginx/nginx.conf was edited and stays; the new one is" in " ".join(lines)
    assert file.read_text() == edited
    assert "other.example.net" in file.with_name("nginx.conf.new").read_text()


def test_without_a_name_nginx_is_left_alone(tmp_path):
    lines = installed(tmp_path)
    assert not (tmp_path / "etc" / "nginx").exists()
    assert not [line for line in lines if "nginx" in line]


def test_the_certificate_of_certbot_is_taken_once_it_is_there(root):
    tls = root / "etc" / "transformers-api" / "tls"
    assert [line for line in installed(root) if "openssl req" in line]
    live = root / "etc" / "letsencrypt" / "live" / NAME
    live.mkdir(parents=True)
    (live / "fullchain.pem").touch()
    assert not [line for line in installed(root) if "openssl req" in line]
    for name in ("fullchain.pem", "privkey.pem"):
        assert str((tls / name).readlink()) == f"/etc/letsencrypt/live/{NAME}/{name}"


def test_a_new_release_takes_the_place_of_the_old_one_and_of_those_before(root):
    releases = root / "opt" / "transformers-api" / "releases"
    current = releases.parent / "current"
    first = current.readlink()
    (releases / "older").mkdir()
    lines = installed(root, "--torch", "cu130")
    assert current.readlink() != first
    assert {path.name for path in releases.iterdir()} == {first.name, current.readlink().name}
    assert [line for line in lines if "restart transformers-api.service" in line]
    assert [line for line in lines if "deploy/torch-cu130.lock" in line]


def test_the_choice_of_torch_is_remembered_and_lends_the_devices(root):
    drop_in = root / "etc/systemd/system/transformers-api.service.d/gpu.conf"
    assert not drop_in.exists()
    installed(root, "--torch", "cu130")
    assert "PrivateDevices=no" in drop_in.read_text()
    chosen = (root / "opt/transformers-api/current").readlink()
    installed(root)
    assert (root / "opt/transformers-api/current").readlink() == chosen
    installed(root, "--torch", "cpu")
    assert not drop_in.exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--torch", "cu99"), "--torch cu99: expected cpu or cu130"),
        (("--domain", "a b"), "--domain a b is not the name of a machine"),
        (("--domain", "x;y"), "is not the name of a machine"),
        (("--domain",), "--domain needs a value"),
        (("--frob",), "--frob is no option"),
    ],
)
def test_a_wrong_option_is_one_clear_line_and_changes_nothing(tmp_path, options, said):
    lines, status = install(tmp_path, *options)
    assert status == 1
    assert len(lines) == 1
    assert said in lines[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root is what it asks for")
def test_without_root_it_says_so():
    done = subprocess.run([SCRIPT], capture_output=True, text=True, timeout=WAIT_S)
    assert done.returncode == 1
    assert "This needs root" in done.stderr


def test_the_release_serves_with_the_command_and_the_settings_of_the_unit(root, tmp_path):
    """Everything but the packages, which are those of the tests."""
    python, *arguments = of_service("ExecStart").split()
    assert python == "/opt/transformers-api/current/venv/bin/python"
    folder = str(root) + of_service("WorkingDirectory")
    command = shlex.join([sys.executable, *arguments])
    here = {"PORT": "0", "PRELOAD_MODEL": "false", "XDG_CACHE_HOME": str(tmp_path / "models")}
    with started("sh", "-c", f"cd {folder} && exec {command}", **environment() | here) as server:
        assert server.get("/healthz") == '{"status":"ok"}'


def test_the_page_names_every_file_and_its_links_lead_somewhere():
    folder = ROOT / "deploy"
    page = (folder / "README.md").read_text()
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    whole = {"compose", "kubernetes"}  # docs/scale.md explains them
    names = {f"{path.parts[0]}/" if path.parts[0] in whole else path.name for path in files}
    names -= {"README.md"}
    assert sorted(name for name in names if name not in page) == []
    links = re.findall(r"\]\(([^)#]+)", page)
    assert links
    assert [link for link in links if not (folder / link).exists()] == []


def test_the_way_to_https_is_ten_lines_and_the_bundle_starts_with_two_commands():
    page = (ROOT / "deploy" / "README.md").read_text()
    (commands,) = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = commands.splitlines()
    assert len(lines) <= 10
    assert [line for line in lines if line.startswith("deploy/install.sh")]
