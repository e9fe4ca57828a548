"""Starting and stopping experts beside those that run: as processes of the local stack, or as containers."""

from fusionroute.launching.launcher import Launch, Launched, Launcher, LaunchFailed

__all__ = ["Launch", "LaunchFailed", "Launched", "Launcher"]
