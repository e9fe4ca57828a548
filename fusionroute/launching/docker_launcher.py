"""Experts as containers, each a copy of a compose service's expert but for its model: image, network, volumes, limits.

Only this command speaks to the docker engine; no service is given its socket. What is started carries the labels of
the compose project, so that `docker compose down --remove-orphans` removes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING
from uuid import uuid4

from fusionroute.launching.launcher import NUM_LOG_LINES, Launch, Launched, LaunchFailed

if TYPE_CHECKING:
    from docker import DockerClient
    from docker.models.containers import Container

COMPOSE = "com.docker.compose."
LAUNCHED_LABEL = "org.fusionroute.launched"
PREFIX = "FUSIONROUTE_EXPERT_"
DEFAULT_PORT = "50061"
SOCKET = "docker.sock"


def connect() -> DockerClient:
    """The engine that DOCKER_HOST names, else the local one. Raises LaunchFailed when there is none."""
    try:
        import docker
        from docker.errors import DockerException
    except ImportError:
        raise LaunchFailed(
            "the docker launcher needs the package docker: pip install 'fusionroute[docker]'"
        ) from None
    try:
        client = docker.from_env()
        client.ping()
    except DockerException as error:
        raise LaunchFailed(f"no docker engine answers: {error}") from error
    return client


class DockerLauncher:
    """Starts experts in the compose project whose experts run.

    Args:
        client: from `connect`; it can do whatever the engine's user can.
        project: of compose; empty = the only one with experts.
    """

    def __init__(self, client: DockerClient, project: str = "") -> None:
        self._client = client
        self._project = project

    def start(self, launch: Launch) -> Launched:
        """Starts a copy of the slot's container, else of any expert's, with another model."""
        with _engine_errors("start a container"):
            pattern = self._pattern(launch.slot)
            name = f"{_label(pattern, 'project')}-expert-{launch.slot}-{uuid4().hex[:8]}"
            settings = _settings(pattern)
            settings |= {
                "SLOT": launch.slot,
                "MODEL": launch.model,
                "STANDBY": "true",
                "ADVERTISE": f"{name}:{settings.get('PORT', DEFAULT_PORT)}",
            }
            settings.setdefault("ROUTER", launch.router)
            if launch.device:
                settings["DEVICE"] = launch.device
            created = self._create(pattern, name, launch.slot, settings)
            try:
                self._client.api.start(created)
            except BaseException:
                self._client.api.remove_container(created, force=True)
                raise
        return Launched(name)

    def address_of(self, launched: Launched) -> str:
        """The name of the container, which is a name in its network, and its port."""
        with _engine_errors(f"look at {launched.name}"):
            return _settings(self._client.containers.get(launched.name)).get("ADVERTISE", "")

    def check(self, launched: Launched) -> None:
        """Raises LaunchFailed once the container has ended, or its health check has given it up."""
        with _engine_errors(f"look at {launched.name}"):
            container = self._client.containers.get(launched.name)
            state = container.attrs["State"]
            health = (state.get("Health") or {}).get("Status", "")
            if state["Status"] in ("created", "running", "restarting") and health != "unhealthy":
                return
        what = health if health == "unhealthy" else f"{state['Status']} with exit code {state['ExitCode']}"
        raise LaunchFailed(f"the container {launched.name} is {what}", self.log_tail(launched))

    def log_tail(self, launched: Launched) -> list[str]:
        """Of the container's log."""
        with _engine_errors(f"read the log of {launched.name}"):
            text = self._client.containers.get(launched.name).logs(tail=NUM_LOG_LINES)
        return text.decode(errors="replace").splitlines()

    def keep(self, launched: Launched) -> None:
        """From now on the engine starts it again as it does its pattern."""
        with _engine_errors(f"update {launched.name}"):
            container = self._client.containers.get(launched.name)
            policy = self._pattern(_settings(container)["SLOT"]).attrs["HostConfig"]["RestartPolicy"]
            container.update(restart_policy=policy)

    def reach(self, address: str) -> str:
        """The container's address in its network, which this machine can reach where the engine runs on it."""
        with _engine_errors(f"look for {address}"):
            container = self._at(address)
            if container is None:
                return address
            networks = container.attrs["NetworkSettings"]["Networks"].values()
            host = next((network["IPAddress"] for network in networks if network.get("IPAddress")), "")
        return f"{host}:{address.rpartition(':')[2]}" if host else address

    def find(self, address: str) -> Launched | None:
        """The container whose expert is registered at `address`."""
        with _engine_errors(f"look for {address}"):
            container = self._at(address)
        return None if container is None or container.name is None else Launched(container.name)

    def stop(self, launched: Launched, deadline_seconds: float) -> None:
        """Stops the container; removes it if it was started here, else leaves that to compose."""
        from docker.errors import NotFound

        with _engine_errors(f"stop {launched.name}"):
            try:
                container = self._client.containers.get(launched.name)
                container.stop(timeout=max(1, round(deadline_seconds)))
                if LAUNCHED_LABEL in container.labels:
                    container.remove(force=True)
            except NotFound:
                return

    def _experts(self) -> list[Container]:
        """All containers of the project that run an expert, stopped ones included, the running ones last."""
        wanted = f"{COMPOSE}project" + (f"={self._project}" if self._project else "")
        found = [
            container
            for container in self._client.containers.list(all=True, filters={"label": wanted})
            if f"{PREFIX}SLOT" in _environment(container)
        ]
        projects = sorted({_label(container, "project") for container in found})
        if len(projects) > 1:
            raise LaunchFailed(f"experts run in several compose projects: {', '.join(projects)}; name one")
        return sorted(found, key=lambda container: container.status == "running")

    def _pattern(self, slot: str) -> Container:
        """One that compose has made, if there is one: what is copied from copies stays the same."""
        experts = self._experts()
        same = [container for container in experts if _settings(container)["SLOT"] == slot]
        made = [container for container in same or experts if LAUNCHED_LABEL not in container.labels]
        candidates = made or same or experts
        if not candidates:
            where = f"the compose project {self._project!r}" if self._project else "any compose project"
            raise LaunchFailed(f"{where} has no container of an expert to take as a pattern")
        return candidates[-1]

    def _at(self, address: str) -> Container | None:
        return next((each for each in self._experts() if _settings(each).get("ADVERTISE") == address), None)

    def _create(self, pattern: Container, name: str, slot: str, settings: Mapping[str, str]) -> str:
        """Creates the copy and returns its id."""
        config, host = pattern.attrs["Config"], dict(pattern.attrs["HostConfig"])
        mounts = [*(host.get("Binds") or []), *(host.get("Mounts") or [])]
        if any(SOCKET in str(mount) for mount in mounts):
            raise LaunchFailed(f"{pattern.name} mounts {SOCKET}: such a container is not copied")
        # Only started again by the engine once it has taken its place; published ports are the pattern's.
        host |= {"PortBindings": {}, "PublishAllPorts": False, "RestartPolicy": {"Name": "no"}, "Links": None}
        # The engine wants the network of the host configuration first, the others are joined.
        networks = sorted(
            pattern.attrs["NetworkSettings"]["Networks"], key=lambda each: each != host.get("NetworkMode")
        )
        others = {key: text for key, text in _environment(pattern).items() if not key.startswith(PREFIX)}
        created = self._client.api.create_container(
            pattern.attrs["Image"],
            name=name,
            command=config.get("Cmd"),
            entrypoint=config.get("Entrypoint"),
            user=config.get("User") or None,
            working_dir=config.get("WorkingDir") or None,
            environment=others | {f"{PREFIX}{key}": text for key, text in settings.items()},
            labels=_labels(pattern, slot, name),
            healthcheck=config.get("Healthcheck") or None,
            stop_signal=config.get("StopSignal"),
            stop_timeout=config.get("StopTimeout"),
            host_config=host,
            networking_config={"EndpointsConfig": {network: {} for network in networks[:1]}},
        )
        container_id = str(created["Id"])
        try:
            for network in networks[1:]:
                self._client.api.connect_container_to_network(container_id, network)
        except BaseException:
            self._client.api.remove_container(container_id, force=True)
            raise
        return container_id


def _environment(container: Container) -> dict[str, str]:
    lines = container.attrs["Config"].get("Env") or []
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def _settings(container: Container) -> dict[str, str]:
    """The expert's settings in a container's environment, without their prefix."""
    found = _environment(container).items()
    return {name.removeprefix(PREFIX): value for name, value in found if name.startswith(PREFIX)}


def _label(container: Container, name: str) -> str:
    return str(container.labels.get(COMPOSE + name, ""))


def _labels(pattern: Container, slot: str, name: str) -> dict[str, str]:
    """Those by which compose knows its containers, of a service that its file does not have."""
    kept = ("project", "project.config_files", "project.working_dir", "config-hash", "oneoff", "version")
    labels = {COMPOSE + key: _label(pattern, key) for key in kept if _label(pattern, key)}
    return {
        **labels,
        f"{COMPOSE}service": name.removeprefix(f"{_label(pattern, 'project')}-"),
        f"{COMPOSE}container-number": "1",
        LAUNCHED_LABEL: slot,
    }


@contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    from docker.errors import DockerException

    try:
        yield
    except DockerException as error:
        raise LaunchFailed(f"the docker engine did not {what}: {error}") from error
