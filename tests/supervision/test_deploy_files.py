"""The files in deploy/: services, image, proxies. What can be run on them is run."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
HARDENING = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectControlGroups": "yes",
    "RestrictSUIDSGID": "yes",
    "LockPersonality": "yes",
    "CapabilityBoundingSet": "",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
}
SECRET = re.compile(r"(?i)password|passwd|BEGIN [A-Z ]*PRIVATE KEY|fik_[0-9a-f]{8}|api[-_]?key *=")


def name(path):
    return path.name


def read_unit(path):
    """Return {section: {key: [values]}}; keys repeat, lines go on after a backslash."""
    sections, current = {}, None
    for line in re.sub(r"\\\n\s*", " ", path.read_text()).splitlines():
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            current = sections.setdefault(line.strip("[]"), {})
            continue
        key, _, value = line.partition("=")
        current.setdefault(key, []).append(value)
    return sections


def test_all_three_services_are_there():
    assert [path.name for path in UNITS] == [
        "fedinfer-gateway.service",
        "fedinfer-site@.service",
        "flower-superlink.service",
    ]


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_service_is_hardened_and_restarts(path):
    service = read_unit(path)["Service"]
    for key, value in HARDENING.items():
        assert service.get(key) == [value], key
    assert service["Restart"] == ["always"]
    assert service["KillMode"] == ["mixed"]
    assert service["User"][0] not in ("root", "")
    assert "--insecure" not in path.read_text()


@pytest.mark.parametrize("path", UNITS, ids=name)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_service_is_understood_by_systemd(path, tmp_path):
    # Programs and users of the target are not on this machine.
    text = path.read_text()
    text = re.sub(r"(?m)^(User|Group)=.*\n", "", text)
    text = re.sub(r"/opt/fedinfer/bin/[\w-]+", "/bin/true", text)
    unit = tmp_path / path.name.replace("@", "@north")
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True
    )
    ours = [line for line in done.stderr.splitlines() if unit.name in line or "Unknown" in line]
    missing = ("Failed to prepare filename", "not found")
    assert [line for line in ours if not any(words in line for words in missing)] == []


@pytest.mark.parametrize("path", UNITS, ids=name)
def test_command_of_a_service_has_options_that_exist(path):
    (command,) = read_unit(path)["Service"]["ExecStart"]
    program, *words = command.split()
    given = {word for word in words if word.startswith("--")}
    if program.endswith("/flower-superlink"):
        from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

        known = {option for action in _options(_parse_args_run_superlink()) for option in action}
    elif words[0] == "serve":
        from fedinfer_flower.cli.serve import serve

        known = _typer_options(serve)
    else:
        from fedinfer_flower.cli.site import up

        assert words[:2] == ["site", "up"]
        known = _typer_options(up)
    assert given <= known


def _options(parser):
    return [action.option_strings for action in parser._actions]


def _typer_options(function):
    app = typer.Typer()
    app.command()(function)
    return {o for parameter in typer.main.get_command(app).params for o in parameter.opts}


def test_superlink_of_the_service_is_private_and_authenticates_sites():
    text = (DEPLOY / "systemd/flower-superlink.service").read_text()
    for words in (
        "--host 127.0.0.1",
        "--enable-supernode-auth",
        "--ssl-certfile",
        "--disable-runtime-dependency-installation",
        "--database",
    ):
        assert words in text


@pytest.mark.parametrize(
    "path", [p for p in sorted(DEPLOY.rglob("*")) if p.is_file()], ids=lambda p: p.name
)
def test_file_holds_no_secret_and_no_private_host(path):
    text = path.read_text()
    assert not SECRET.search(text)
    for host in re.findall(r"[\w.-]+\.(?:com|net|io|internal|local)\b", text):
        assert host in ("flower.ai",), host


# -- image -------------------------------------------------------------------------------


def test_image_runs_as_a_user_and_copies_nothing_but_code():
    lines = [
        line for line in (DEPLOY / "Containerfile").read_text().splitlines() if line[:1] != "#"
    ]
    copies = [line.split()[1:-1] for line in lines if line.startswith("COPY")]
    sources = [source for line in copies for source in line]
    assert sources == [
        *("pyproject.toml", "constraints.txt", "README.md", "LICENSE"),
        "fedinfer_flower",
    ]
    assert all((ROOT / source).exists() for source in sources)
    assert lines.index("USER fedinfer") < lines.index('ENTRYPOINT ["fedinfer"]')
    assert not any(line.startswith("ADD") for line in lines)


# -- proxies -----------------------------------------------------------------------------


def blocks(text, opening):
    """Return the bodies of all blocks whose first line matches, braces balanced."""
    found = []
    for match in re.finditer(opening, text):
        depth, begin = 1, match.end()
        for place in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[place], 0)
            if depth == 0:
                found.append(text[begin:place])
                break
        else:
            raise AssertionError("braces do not match")
    return found


def test_nginx_passes_fleet_routes_of_the_superlink_alone():
    text = re.sub(r"(?m)#.*$", "", (DEPLOY / "nginx.conf").read_text())
    fleet, gateway = blocks(text, r"(?m)^server \{")
    assert re.findall(r"location (.+) \{", fleet) == ["/v1/fleet/", "/"]
    (rest,) = blocks(fleet, r"location / \{")
    assert rest.split() == ["return", "404;"]
    assert fleet.count("proxy_pass") == 1
    for setting in ("client_max_body_size", "client_body_timeout", "proxy_read_timeout"):
        assert setting in fleet
        assert setting in gateway
    assert "proxy_buffering               off" in gateway
    for server in (fleet, gateway):
        assert "ssl_certificate " in server
        assert "proxy_ssl_verify              on" in server
    statements = re.sub(r"[{}]", ";", text)
    assert all(s.strip() == "" or "\n" not in s.strip() for s in statements.split(";"))


@pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not installed")
def test_nginx_accepts_its_file(tmp_path):
    text = (DEPLOY / "nginx.conf").read_text()
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", "/CN=x", "-keyout", "x.key", "-out", "x.pem"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    text = re.sub(r"/etc/\S+\.(pem|crt);", f"{tmp_path}/x.pem;", text)
    text = re.sub(r"/etc/\S+\.key;", f"{tmp_path}/x.key;", text)
    (tmp_path / "fedinfer.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; include {tmp_path}/fedinfer.conf; }}\n"
    )
    done = subprocess.run(
        ["nginx", "-t", "-p", str(tmp_path), "-c", str(tmp_path / "nginx.conf")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_caddy_passes_fleet_routes_of_the_superlink_alone():
    text = re.sub(r"(?m)#.*$", "", (DEPLOY / "Caddyfile").read_text())
    (fleet,) = blocks(text, r"(?m)^fleet\.example \{")
    (gateway,) = blocks(text, r"(?m)^gateway\.example \{")
    assert re.findall(r"handle ?(\S*) \{", fleet) == ["/v1/fleet/*", ""]
    assert fleet.count("reverse_proxy") == 1
    assert "respond 404" in fleet
    assert "max_size" in fleet
    assert "flush_interval -1" in gateway
    assert "insecure" not in text


@pytest.mark.skipif(shutil.which("caddy") is None, reason="caddy is not installed")
def test_caddy_accepts_its_file():
    command = ["caddy", "adapt", "--config", str(DEPLOY / "Caddyfile"), "--adapter", "caddyfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
