//! Memory that belongs to Python, read and written in place.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// The memory of a writable or readable buffer of single bytes in one piece.
pub struct Memory {
    /// Keeps the memory where it is.
    _buffer: PyBuffer<u8>,
    address: *mut u8,
    /// Bytes.
    pub length: usize,
}

// SAFETY: the address is that of memory which its exporter keeps in place for as long as the buffer
// is held, whatever thread looks at it; the buffer itself is released where it was made.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn of(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if !buffer.is_c_contiguous() || writable && buffer.readonly() {
            return Err(PyValueError::new_err(
                "the buffer must be contiguous, and writable to read",
            ));
        }
        let (address, length) = (buffer.buf_ptr().cast(), buffer.len_bytes());
        Ok(Self { _buffer: buffer, address, length })
    }

    /// # Safety
    /// Nobody may change the memory while the slice lives.
    pub unsafe fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: the exporter vouches for `length` bytes from `address` on, and the caller for the
        // rest.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }

    /// # Safety
    /// Nobody else may look at the memory while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "the memory belongs to the exporter")]
    pub unsafe fn bytes_mut(&self) -> &mut [u8] {
        if self.length == 0 {
            return &mut [];
        }
        // SAFETY: the exporter vouches for `length` writable bytes from `address` on, and the
        // caller for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}
