//! Reading an adapter's file while others may write to it.

use std::io;
use std::time::SystemTime;

use sha2::{Digest, Sha256};

use crate::adapter::{Adapter, hexadecimal};
use crate::error::{Error, Result};
use crate::file::read_at;

/// Bytes that a digest reads at a time.
const CHUNK: usize = 1 << 20;

/// Size and time of the last change of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    length: u64,
    modified: Option<SystemTime>,
}

impl Stamp {
    /// As the file is now.
    pub fn of(adapter: &Adapter) -> Result<Self> {
        let file = adapter.file();
        let metadata = file.file().metadata().map_err(|error| Error::io(file.path(), error))?;
        Ok(Self { length: metadata.len(), modified: metadata.modified().ok() })
    }

    /// An error if the file has changed since.
    pub fn check(self, adapter: &Adapter) -> Result<()> {
        if Self::of(adapter)? == self { Ok(()) } else { Err(changed(adapter)) }
    }
}

fn changed(adapter: &Adapter) -> Error {
    Error::adapter(
        adapter.file().path(),
        "changed while it was read; scan it again when it is whole",
    )
}

/// Bytes of the adapter's file from `offset` on, in a buffer that grows as needed.
pub fn read<'a>(
    adapter: &Adapter,
    offset: u64,
    length: usize,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    let bytes = room(buffer, length);
    read_into(adapter, offset, bytes)?;
    Ok(bytes)
}

/// The first `length` bytes of a buffer that grows as needed.
pub fn room(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

/// Fills `bytes` with the adapter's file from `offset` on.
pub fn read_into(adapter: &Adapter, offset: u64, bytes: &mut [u8]) -> Result<()> {
    read_at(adapter.file().file(), bytes, offset).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => changed(adapter),
        _ => Error::io(adapter.file().path(), error),
    })
}

/// SHA-256 of the adapter's whole file.
pub fn digest(adapter: &Adapter, length: u64, buffer: &mut Vec<u8>) -> Result<String> {
    let mut hasher = Sha256::new();
    let mut offset = 0;
    while offset < length {
        let size = CHUNK.min((length - offset) as usize);
        hasher.update(read(adapter, offset, size, buffer)?);
        offset += size as u64;
    }
    Ok(hexadecimal(&hasher.finalize()))
}
