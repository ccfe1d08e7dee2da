import io
import tarfile

import pytest


@pytest.fixture(scope="session")
def pack():
    """Writes a tar of (name or TarInfo, bytes) members and returns its path."""

    def write(path, members, *, layout=tarfile.USTAR_FORMAT):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=layout) as tar:
            for name, data in members:
                info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
                info.size = len(data) or info.size
                tar.addfile(info, io.BytesIO(data) if data else None)
        return path

    return write
