"""Where a run is going to be started: at a site, on nodes of one type."""

from dataclasses import dataclass

from cluster import directory, sites
from cluster.sites import NodeType, Site
from jobs.common import costs, home
from raylab.errors import UsageError, unknown


@dataclass(frozen=True)
class Place:
    """`site`: a section of sites.toml, else that of this home's only cluster; `node_type`: else the site's first."""

    site: str | None = None
    node_type: str | None = None

    def find(self) -> tuple[Site, NodeType] | None:
        """The site and the type of its nodes; None where there is no cluster. Raises UsageError for a wrong name."""
        if self.site is not None:
            site = sites.site(self.site)
        else:
            try:
                site = directory.find(home.home(), None).site
            except UsageError:  # this home has no cluster, or several
                return None
            site = site.model_copy(update={"billing": costs.billing_of(site.name, site.billing)})
        kind = self.node_type or next(iter(site.nodes))
        if kind not in site.nodes:
            raise unknown(f"node type of site '{site.name}':", kind, site.nodes)
        return site, site.nodes[kind]


HERE = Place()
