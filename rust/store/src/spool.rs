//! Objects that are taken as a whole: adapters, in memory or, where they are large, in a file without a name.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::StreamExt;
use lorafast::storage::local;
use lorafast::storage::source::Requests;
use lorafast::{Error, Result};

use crate::runtime;
use crate::source::Pinned;

/// Up to so many bytes lie in memory.
const IN_MEMORY: u64 = 64 << 20;
/// Ranges that are asked for at the same time.
const AT_ONCE: usize = 4;
const RANGE: u64 = 8 << 20;

/// An object of which all is here once any of it was read.
#[derive(Debug)]
pub(crate) struct Spool {
    object: Arc<Pinned>,
    content: Mutex<Option<Arc<Content>>>,
}

#[derive(Debug)]
enum Content {
    Memory(Vec<u8>),
    File(File),
}

impl Spool {
    pub fn new(object: Arc<Pinned>) -> Self {
        Self { object, content: Mutex::default() }
    }

    /// Reads, after all of it has come.
    ///
    /// # Errors
    /// Those of the store; [`Error::Io`] if the file cannot be made.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let content = {
            let mut content = self.content.lock().unwrap_or_else(PoisonError::into_inner);
            match &*content {
                Some(content) => content.clone(),
                None => content.insert(Arc::new(self.fetch()?)).clone(),
            }
        };
        match &*content {
            Content::Memory(bytes) => {
                let start = offset as usize;
                buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
                Ok(())
            }
            Content::File(file) => local::read_at(file, buffer, offset)
                .map_err(|error| Error::io(self.object.shown(), error)),
        }
    }

    /// What is still to be asked for.
    pub fn requests(&self) -> Requests {
        match *self.content.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(_) => Requests::default(),
            None => {
                let bytes = self.object.size;
                Requests { requests: bytes.div_ceil(RANGE), bytes }
            }
        }
    }

    fn fetch(&self) -> Result<Content> {
        let (object, size) = (&self.object, self.object.size);
        let file = if size > IN_MEMORY { Some(unnamed()?) } else { None };
        let mut bytes = if file.is_none() { vec![0; size as usize] } else { Vec::new() };
        let ranges = (0..size).step_by(RANGE as usize).map(|start| start..size.min(start + RANGE));
        let fetched = futures_util::stream::iter(ranges.map(|range| async move {
            object.read(range.clone()).await.map(|content| (range.start, content))
        }));
        let all = async {
            let mut arriving = fetched.buffer_unordered(AT_ONCE);
            while let Some(arrived) = arriving.next().await {
                let (start, content) = arrived?;
                match &file {
                    Some((file, path)) => local::write_at(file, &content, start)
                        .map_err(|error| Error::io(path, error))?,
                    None => bytes[start as usize..][..content.len()].copy_from_slice(&content),
                }
            }
            Ok(())
        };
        runtime::wait(&object.connection.stop, all)?;
        Ok(match file {
            Some((file, _)) => Content::File(file),
            None => Content::Memory(bytes),
        })
    }
}

/// A file that nobody else can open, gone with this process.
fn unnamed() -> Result<(File, PathBuf)> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("lorafast-{}-{number}", std::process::id()));
    let file = local::create(&path)?;
    local::remove(&path);
    Ok((file, path))
}
