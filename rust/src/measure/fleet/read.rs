//! Reading an adapter's file into buffers that stay.

use crate::adapter::Adapter;
use crate::error::Result;

/// Bytes that a digest reads at a time.
const CHUNK: usize = 1 << 20;

/// Bytes of the adapter's file from `offset` on, in a buffer that grows as needed.
pub fn read<'a>(
    adapter: &Adapter,
    offset: u64,
    length: usize,
    buffer: &'a mut Vec<u8>,
) -> Result<&'a [u8]> {
    let bytes = room(buffer, length);
    adapter.file().read_raw(offset, bytes)?;
    Ok(bytes)
}

/// The first `length` bytes of a buffer that grows as needed.
pub fn room(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    &mut buffer[..length]
}

/// BLAKE3 of the adapter's whole file.
pub fn digest(adapter: &Adapter, length: u64, buffer: &mut Vec<u8>) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut offset = 0;
    while offset < length {
        let size = CHUNK.min((length - offset) as usize);
        hasher.update(read(adapter, offset, size, buffer)?);
        offset += size as u64;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
