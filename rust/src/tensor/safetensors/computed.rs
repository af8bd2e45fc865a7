//! Tensors that are computed from others, piece by piece, whenever they are read.

use std::fmt::{self, Debug};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::header::{self, Parsed};
use super::{Header, Tensor, TensorFile, TensorInfo};
use crate::error::{Owner, Result};
use crate::storage::local::Stamp;
use crate::storage::source::Source;
use crate::tensor::dtype::Dtype;

/// What computes some of a tensor's elements: their bytes, little-endian.
pub type Make = Arc<dyn Fn(Range<u64>) -> Result<Vec<u8>> + Send + Sync>;

/// How a tensor is computed.
#[derive(Clone)]
pub struct Recipe {
    make: Make,
    origins: Vec<Arc<TensorFile>>,
    piece: Option<u64>,
}

impl Recipe {
    /// Computed by that, which is called for each read with the elements that are asked for.
    pub fn new(make: impl Fn(Range<u64>) -> Result<Vec<u8>> + Send + Sync + 'static) -> Self {
        Self { make: Arc::new(make), origins: Vec::new(), piece: None }
    }

    /// The same, made from these: it has changed where one of their files has.
    #[must_use]
    pub fn from<'a>(mut self, tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        for tensor in tensors {
            let file = tensor.file();
            if !self.origins.iter().any(|other| Arc::ptr_eq(other, file)) {
                self.origins.push(file.clone());
            }
        }
        self
    }

    /// The same, of which so many elements are asked for together where all of them go by: what takes
    /// as long to compute for a few of them as for all.
    #[must_use]
    pub fn in_pieces(self, elements: Option<u64>) -> Self {
        Self { piece: elements, ..self }
    }
}

/// The bytes of a tensor that is computed. Nothing of it is kept.
struct Computed {
    recipe: Recipe,
    length: u64,
    /// Bytes of an element.
    element: u64,
}

impl Debug for Computed {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Computed").field("length", &self.length).finish_non_exhaustive()
    }
}

impl Source for Computed {
    fn stamp(&self) -> Stamp {
        let stamps = self.recipe.origins.iter().map(|file| file.stamp());
        Stamp { length: self.length, ..Stamp::of_all(stamps) }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        if buffer.is_empty() {
            return Ok(());
        }
        let elements = offset / self.element..end.div_ceil(self.element);
        let (start, expected) = (elements.start, (elements.end - elements.start) * self.element);
        let bytes = (self.recipe.make)(elements).map_err(io::Error::other)?;
        if bytes.len() as u64 != expected {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let first = (offset - start * self.element) as usize;
        buffer.copy_from_slice(&bytes[first..first + buffer.len()]);
        Ok(())
    }

    fn is_local(&self) -> bool {
        self.recipe.origins.iter().all(|file| file.source().is_local())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        for file in &self.recipe.origins {
            if !file.source().is_unchanged()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn piece(&self) -> Option<u64> {
        self.recipe.piece.map(|elements| elements.saturating_mul(self.element))
    }
}

impl Tensor {
    /// A tensor of an adapter's that is computed whenever it is read, as far as it is read. Errors
    /// about it name `path`; those of what computes it are handed on as they are.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] for a type whose elements are no whole bytes, and for a shape that is
    /// too large to count.
    pub fn computed(
        path: &Path,
        name: impl Into<String>,
        dtype: Dtype,
        shape: Vec<u64>,
        recipe: Recipe,
    ) -> Result<Self> {
        let owner = Owner::Adapter;
        let name = name.into();
        let element = dtype.bits().filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
        let elements = shape.iter().try_fold(1u64, |all, extent| all.checked_mul(*extent));
        let sizes = element.and_then(|element| Some((element, elements?.checked_mul(element)?)));
        let (element, length) = sizes.ok_or_else(|| {
            owner.broken(path, format!("has {name} of shape {shape:?}, whose size is not known"))
        })?;
        let info = TensorInfo { name, dtype, shape, range: 0..length };
        let header = Header { tensors: vec![info.clone()], ..Header::default() };
        // Encoded and parsed: checked like a file's.
        let beginning = header.encode();
        let all = beginning.len() as u64 + length;
        let Parsed { header, positions } =
            header::parse(&beginning, all).map_err(|message| owner.broken(path, message))?;
        let source: Box<dyn Source> = Box::new(Computed { recipe, length, element });
        let (path, stamp) = (path.to_path_buf(), source.stamp());
        let file =
            TensorFile { path, owner, source, stamp, beginning, data_start: 0, header, positions };
        Ok(Self::new(Arc::new(file), info))
    }

    /// How many of its elements are best read together, where that counts.
    pub fn piece(&self) -> Option<u64> {
        let element = self.dtype.bits()?.div_ceil(8);
        self.file().source().piece().map(|bytes| bytes.min(self.bytes()) / element)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::ControlFlow;
    use std::sync::Mutex;

    use super::*;
    use crate::error::Error;
    use crate::fixtures::{ramp, write};

    type Asked = Arc<Mutex<Vec<(u64, u64)>>>;

    /// The numbers from 0 on, and which of them were asked for.
    fn counting(count: u64, piece: Option<u64>) -> (Tensor, Asked) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let log = asked.clone();
        let recipe = Recipe::new(move |elements| {
            log.lock().expect("no panic").push((elements.start, elements.end));
            Ok(elements.flat_map(|index| (index as f32).to_le_bytes()).collect())
        });
        let tensor = Tensor::computed(
            Path::new("x"),
            "count",
            Dtype::F32,
            vec![count],
            recipe.in_pieces(piece),
        );
        (tensor.expect("sound"), asked)
    }

    #[test]
    fn what_is_read_is_computed_and_nothing_else() {
        let (tensor, asked) = counting(1000, None);
        let whole: Vec<u8> = (0..1000).flat_map(|index| (index as f32).to_le_bytes()).collect();
        assert_eq!(tensor.read_range(9..27).expect("computed"), whole[9..27]);
        assert_eq!(*asked.lock().expect("no panic"), [(2, 7)]);
        assert_eq!(tensor.read_range(40..40).expect("nothing"), [0; 0]);
        assert_eq!(tensor.read().expect("computed"), whole);
        assert_eq!(*asked.lock().expect("no panic"), [(2, 7), (0, 1000)]);
        let rows = TensorInfo { shape: vec![3], range: 400..412, ..tensor.info().clone() };
        let rows = Tensor::new(tensor.file().clone(), rows);
        assert_eq!(rows.read_f32().expect("computed"), [100.0, 101.0, 102.0]);
        assert!(tensor.has_same_bytes(&counting(1000, None).0).expect("computed"));
    }

    #[test]
    fn what_has_to_be_computed_together_goes_by_together() {
        for (piece, runs) in [(None, 5), (Some(1), 5), (Some(100_000), 3), (Some(300_000), 1)] {
            let (tensor, asked) = counting(300_000, piece);
            let mut at = 0;
            let mut each = |start, bytes: &[u8]| {
                assert_eq!(start, at);
                at += bytes.len() as u64;
                ControlFlow::Continue(())
            };
            tensor.for_each_chunk(&mut each).expect("computed");
            assert_eq!((at, asked.lock().expect("no panic").len()), (1_200_000, runs), "{piece:?}");
            let digest = tensor.file().sha256().expect("computed");
            assert_eq!(digest, counting(300_000, None).0.file().sha256().expect("computed"));
            let (other, _) = counting(300_000, None);
            assert!(other.has_same_bytes(&tensor).expect("computed"));
            assert_eq!(asked.lock().expect("no panic").len(), 3 * runs, "{piece:?}");
        }
    }

    #[test]
    fn errors_keep_their_class_and_their_words_however_deep_they_lie() {
        let failing = |error: fn() -> Error| {
            let recipe = Recipe::new(move |_| Err(error()));
            let inner = Tensor::computed(Path::new("x"), "inner", Dtype::F32, vec![4], recipe);
            let inner = inner.expect("sound");
            let recipe = Recipe::new(move |elements: Range<u64>| {
                inner.read_range(elements.start * 4..elements.end * 4)
            });
            let outer = Tensor::computed(Path::new("y"), "outer", Dtype::F32, vec![4], recipe);
            outer.expect("sound").read().expect_err("it fails")
        };
        let found = failing(|| Error::adapter("a.safetensors", "changed while it was read"));
        assert!(matches!(found, Error::Adapter { .. }), "{found:?}");
        assert_eq!(found.to_string(), "a.safetensors: changed while it was read");
        assert!(matches!(failing(|| Error::Cancelled), Error::Cancelled));
        let found = failing(|| Error::io("a.safetensors", io::ErrorKind::NotFound.into()));
        assert!(matches!(&found, Error::Io { path, .. } if path == Path::new("a.safetensors")));
        let recipe = Recipe::new(|_| Ok(Vec::new()));
        let short = Tensor::computed(Path::new("x"), "short", Dtype::F32, vec![4], recipe);
        short.expect("sound").read().expect_err("too few bytes");
        let recipe = || Recipe::new(|_| Ok(Vec::new()));
        for (dtype, shape) in [
            (Dtype::from_name("F4"), vec![4]),
            (Dtype::from_name("Q9"), vec![4]),
            (Dtype::F32, vec![1 << 40, 1 << 40]),
        ] {
            let error = Tensor::computed(Path::new("x"), "odd", dtype, shape, recipe());
            assert!(matches!(error, Err(Error::Adapter { .. })));
        }
    }

    #[test]
    fn it_changes_with_the_files_that_it_is_made_from() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("one.safetensors");
        write(&path, &[("x", Dtype::F32, &[4], ramp(4, 1))]);
        let file = Arc::new(TensorFile::open_adapter(&path).expect("sound"));
        let stored = file.value("x").expect("there");
        let own = stored.clone();
        let recipe = Recipe::new(move |elements: Range<u64>| {
            own.read_range(elements.start * 4..elements.end * 4)
        });
        let recipe = recipe.from([&stored, &stored]);
        let copy = Tensor::computed(&path, "copy", Dtype::F32, vec![4], recipe).expect("sound");
        assert_eq!(copy.read().expect("computed"), stored.read().expect("read"));
        copy.file().check_unchanged().expect("nobody wrote to it");
        std::fs::remove_file(&path).expect("removed");
        let error = copy.file().check_unchanged().expect_err("it is gone");
        assert!(error.to_string().contains("changed while it was read"), "{error}");
    }
}
