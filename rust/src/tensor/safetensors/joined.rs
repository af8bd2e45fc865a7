//! The data of several files as one source, with their headers at its end.

use std::io;

use crate::storage::local::Stamp;
use crate::storage::source::Source;

/// The data of one of the files.
#[derive(Debug)]
pub(super) struct Part {
    pub source: Box<dyn Source>,
    /// Where its data begins in the whole.
    pub start: u64,
    /// Where it begins in the file.
    pub first: u64,
    pub length: u64,
}

/// Several files, their data one after the other.
#[derive(Debug)]
pub(super) struct Joined {
    pub parts: Vec<Part>,
    /// Bytes of data in all.
    pub end: u64,
    /// What follows them: the files' headers.
    pub names: Vec<u8>,
}

impl Source for Joined {
    fn stamp(&self) -> Stamp {
        let length = self.end + self.names.len() as u64;
        Stamp { length, ..Stamp::of_all(self.parts.iter().map(|part| part.source.stamp())) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        let end = end.filter(|end| *end <= self.end + self.names.len() as u64);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        for Part { source, start, first, length } in &self.parts {
            let (from, to) = (offset.max(*start), end.min(start + length));
            if from < to {
                let target = &mut buffer[(from - offset) as usize..(to - offset) as usize];
                source.read_at(target, first + from - start)?;
            }
        }
        if end > self.end {
            let from = offset.max(self.end);
            let names = (from - self.end) as usize..(end - self.end) as usize;
            buffer[(from - offset) as usize..].copy_from_slice(&self.names[names]);
        }
        Ok(())
    }

    fn is_local(&self) -> bool {
        self.parts.iter().all(|part| part.source.is_local())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        for part in &self.parts {
            if !part.source.is_unchanged()? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
