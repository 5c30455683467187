# SPDX-License-Identifier: Apache-2.0
"""``--share DIR[:TAG][,ro][,fs=…][,owner=…]``: a directory of the host's that the guest can mount by its tag.

A guest's kernel may know 9p, virtio-fs or both, so a share is there as both, unless ``fs`` says which.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final

from softkvm.abi.sizes import Size
from softkvm.vmm.devices.spec import Placement, Words
from softkvm.vmm.devices.virtio_9p import P9
from softkvm.vmm.devices.virtio_fs import TAG_SIZE, Fs
from softkvm.vmm.errors import ConfigError
from softkvm.vmm.share.share import Share

if TYPE_CHECKING:
    from softkvm.vmm.machine import Machine

OPTION: Final = "--share"

TAG: Final = Size("bytes of a share's tag", TAG_SIZE, ConfigError, least=1, effect="ConfigError", where=__name__)

ANY, P9_ONLY, FS_ONLY = "any", "9p", "virtiofs"
ROOT, HOST = "root", "host"


@dataclass(frozen=True, slots=True)
class ShareSpec:
    """``--share``."""

    directory: str
    tag: str
    read_only: bool = False
    file_system: str = ANY
    """How the guest can mount it: 9p, virtiofs, any."""
    owner: str = ROOT
    """Whose the files of the process's own user are: the guest's root's, or as on the host."""
    placement: Placement = field(default_factory=Placement)

    def attach(self, machine: Machine) -> list[P9 | Fs]:
        """Make the devices, each with a thread of its own, for a slow file to keep no other device waiting."""
        present = (transport.device for transport in machine.board.virtio.transports.values())
        if any(isinstance(device, (P9, Fs)) and device.tag == self.tag for device in present):
            raise ConfigError(f"{OPTION} {self.directory}: another share has the tag {self.tag}: DIR:TAG gives a tag")
        devices: list[P9 | Fs] = []
        kinds: tuple[type[P9] | type[Fs], ...] = (Fs, P9)
        for kind in kinds:
            if self.file_system not in (ANY, {Fs: FS_ONLY, P9: P9_ONLY}[kind]):
                continue
            device = kind(self._share(), self.tag)
            placement = self.placement
            if placement.name and self.file_system == ANY:
                placement = replace(placement, name=f"{placement.name}-{kind.name}")
            placement.add(machine, device, machine.workers.own(f"share {self.tag}"))
            devices.append(device)
        return devices

    def _share(self) -> Share:
        try:
            return Share(self.directory, read_only=self.read_only, own_is_root=self.owner == ROOT)
        except OSError as error:
            raise ConfigError(f"{OPTION} {self.directory}: {error.strerror}") from None


def parse(text: str) -> ShareSpec:
    """Read ``--share``'s text. The tag is behind the last colon, unless a slash follows; by default the name of DIR."""
    words = Words.of(OPTION, text)
    directory, colon, tag = words.first.rpartition(":")
    if not colon or "/" in tag:
        directory, tag = words.first, ""
    if not directory:
        raise words.error("expected DIR[:TAG]")
    tag = tag or os.path.basename(os.path.realpath(directory))
    _check_tag(words, tag)
    spec = ShareSpec(
        os.path.abspath(directory),
        tag,
        read_only=words.flag("ro"),
        file_system=words.choice("fs", (ANY, P9_ONLY, FS_ONLY), ANY),
        owner=words.choice("owner", (ROOT, HOST), ROOT),
        placement=words.placement(),
    )
    words.end()
    return spec


def _check_tag(words: Words, tag: str) -> None:
    """A tag is mounted as ``/mnt/TAG``: it has to be a name."""
    if not tag:
        raise words.error("the root directory needs a tag, as in /:root")
    if tag in (".", "..") or not tag.isprintable():
        raise words.error(f"tag {tag!r}: expected a name of printable characters")
    length = len(tag.encode("utf-8", "surrogateescape"))
    if not TAG.allows(length):
        raise words.error(f"a tag of {length} bytes, expected at most {TAG.most}: DIR:TAG gives it another one")
