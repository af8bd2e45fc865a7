//! Safetensors files written from tensors, wherever those lie.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::path::Path;

use indexmap::IndexMap;
use rayon::prelude::*;

use super::{Header, Tensor, TensorInfo};
use crate::error::{Error, Result};
use crate::storage::local;

/// What goes into a header once the data behind it is known: values of metadata that are as long as
/// those that stood there before.
pub trait Afterwards {
    /// The header as it is written first.
    fn begin(&mut self, header: &Header);
    /// The data, in order.
    fn update(&mut self, bytes: &[u8]);
    /// The metadata as it is in the end.
    fn finish(self: Box<Self>, metadata: &mut IndexMap<String, String>);
}

/// Writes a safetensors file with these tensors under these names: whole, or not at all. Whoever moves it to
/// its place brings it to the disk before. The widest
/// elements come first, so that each tensor begins at a multiple of its element's size. The threads of the
/// pool that it is called in write a tensor each.
///
/// # Errors
/// [`Error::Argument`] for two tensors of one name, [`Error::Io`], or that what is read changed.
pub fn write(
    path: &Path,
    metadata: IndexMap<String, String>,
    tensors: Vec<(String, Tensor)>,
) -> Result<()> {
    write_with(path, metadata, tensors, None)
}

/// The same with what its data, which then goes by in order, makes of the metadata.
///
/// # Errors
/// Those of [`write`].
pub fn write_with(
    path: &Path,
    metadata: IndexMap<String, String>,
    mut tensors: Vec<(String, Tensor)>,
    mut afterwards: Option<Box<dyn Afterwards>>,
) -> Result<()> {
    let mut names = HashSet::new();
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(Error::Argument(format!("two tensors would be called {name}")));
    }
    tensors.sort_by_key(|(_, tensor)| std::cmp::Reverse(tensor.dtype.bits().unwrap_or(64)));
    let mut header = Header { metadata, tensors: Vec::with_capacity(tensors.len()) };
    let mut end = 0;
    for (name, tensor) in &tensors {
        let range = end..end + tensor.bytes();
        end = range.end;
        let name = name.clone();
        header.tensors.push(TensorInfo { name, range, ..tensor.info().clone() });
    }
    let beginning = header.encode();
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = path.with_file_name(name);
    let failed = |error| Error::io(&partial, error);
    let written = || -> Result<()> {
        let file = local::create(&partial)?;
        local::write_at(&file, &beginning, 0).map_err(failed)?;
        let put = |tensor: &Tensor, info: &TensorInfo, each: &mut dyn FnMut(&[u8])| {
            let start = beginning.len() as u64 + info.range.start;
            let mut failure = None;
            tensor.for_each_chunk(&mut |offset, bytes| {
                each(bytes);
                match local::write_at(&file, bytes, start + offset) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        failure = Some(failed(error));
                        ControlFlow::Break(())
                    }
                }
            })?;
            failure.map_or(Ok(()), Err)
        };
        if let Some(afterwards) = &mut afterwards {
            afterwards.begin(&header);
            for ((_, tensor), info) in tensors.iter().zip(&header.tensors) {
                put(tensor, info, &mut |bytes| afterwards.update(bytes))?;
            }
        } else {
            let tensors = tensors.par_iter().zip(&header.tensors);
            tensors.try_for_each(|((_, tensor), info)| put(tensor, info, &mut |_| ()))?;
        }
        if let Some(afterwards) = afterwards {
            afterwards.finish(&mut header.metadata);
            let last = header.encode();
            assert_eq!(last.len(), beginning.len(), "values of the same length");
            local::write_at(&file, &last, 0).map_err(failed)?;
        }
        local::rename(&partial, path)
    }();
    if written.is_err() {
        local::remove(&partial);
    }
    written
}
