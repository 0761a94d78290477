"""A whole deployment on one machine: SuperLink, sites, gateway, each a process of its own."""

from fedinfer_flower.simulation.loopback.certificates import Authority
from fedinfer_flower.simulation.loopback.deployment import Deployment, SiteSpec

__all__ = ["Authority", "Deployment", "SiteSpec"]
