//! The factors that are made, in the type in which they are written, on disk until then.

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;

use super::factored::{Factors, Rows};
use crate::adapter::Module;
use crate::adapter::deltas::LowRank;
use crate::error::{Owner, Result};
use crate::kernel::convert::{convert, widen_f64};
use crate::storage::scratch::ScratchFile;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, Tensor, TensorFile, TensorInfo};

/// A file that factors are put into as they are made, module by module and by several threads, so that
/// no more of them is in memory than what is worked on. It is removed with this value.
#[derive(Debug)]
pub(crate) struct Results {
    file: ScratchFile,
}

/// Where the two factors of a module lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    rank: u64,
    dtype: Dtype,
    b: u64,
    a: u64,
    bias: Option<u64>,
}

/// Factors in the type in which they are written, row after row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rounded {
    pub dtype: Dtype,
    pub rank: usize,
    pub b: Vec<u8>,
    pub a: Vec<u8>,
}

impl Rounded {
    /// Rounds factors once; `None` if a finite number is none in that type.
    pub fn of(factors: &Factors, dtype: &Dtype) -> Option<Self> {
        let b = rounded(&factors.b, dtype)?;
        let a = rounded(&factors.a, dtype)?;
        Some(Self { dtype: dtype.clone(), rank: factors.b.columns, b, a })
    }

    /// The factors as they are now, of the shape of those that they were.
    pub fn factors(&self, exact: &Factors) -> Factors {
        let of =
            |bytes: &[u8], exact: &Rows| Rows { values: widen_f64(&self.dtype, bytes), ..*exact };
        Factors { b: of(&self.b, &exact.b), a: of(&self.a, &exact.a) }
    }
}

/// Numbers in that type; `None` if a finite one is none in it.
pub(crate) fn rounded(rows: &Rows, dtype: &Dtype) -> Option<Vec<u8>> {
    let wide: &[u8] = bytemuck::cast_slice(&rows.values);
    if *dtype == Dtype::F64 {
        return Some(wide.to_vec());
    }
    let mut bytes = vec![0; rows.values.len() * dtype.size()];
    convert(&Dtype::F64, wide, dtype, &mut bytes).then_some(bytes)
}

impl Results {
    /// An empty file in a directory.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be made.
    pub fn new(directory: &Path) -> Result<Self> {
        Ok(Self { file: ScratchFile::create(directory.join("factors.partial"))? })
    }

    /// Takes factors, and a bias in their type.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn put(&self, factors: &Rounded, bias: Option<&[u8]>) -> Result<Place> {
        let b = self.file.append(&[&factors.b, &factors.a, bias.unwrap_or_default()])?;
        let a = b + factors.b.len() as u64;
        let bias = bias.map(|_| a + factors.a.len() as u64);
        Ok(Place { rank: factors.rank as u64, dtype: factors.dtype.clone(), b, a, bias })
    }

    /// The modules whose factors were put, each like the one that it is given with, with a scale of s.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn modules(&self, made: Vec<(Module, Place, f64)>) -> Result<IndexMap<String, Module>> {
        let mut header = Header::default();
        let mut wanted = Vec::with_capacity(made.len());
        for (module, place, scaling) in made {
            let mut a_shape = vec![place.rank];
            let mut outputs = module.outputs();
            if module.delta.is_by_tokens() {
                a_shape.push(outputs);
                outputs = module.inputs();
            } else {
                a_shape.extend(module.delta.input_shape());
            }
            let mut b_shape = vec![outputs, place.rank];
            b_shape.extend(std::iter::repeat_n(1, a_shape.len() - 2));
            let mut add = |what: &str, shape: Vec<u64>, start: u64| {
                let bytes = shape.iter().product::<u64>() * place.dtype.size() as u64;
                let name = format!("{}.{what}", module.key);
                let (dtype, range) = (place.dtype.clone(), start..start + bytes);
                header.tensors.push(TensorInfo { name: name.clone(), dtype, shape, range });
                name
            };
            let names = [add("a", a_shape, place.a), add("b", b_shape, place.b)];
            let bias = place.bias.map(|start| add("bias", vec![outputs], start));
            wanted.push((module, names, bias, place.rank, scaling));
        }
        let file = Arc::new(TensorFile::of_raw_file(self.file.path(), Owner::Adapter, header)?);
        let tensor = |name: &str| -> Tensor { file.value(name).expect("it was put") };
        let mut modules = IndexMap::with_capacity(wanted.len());
        for (module, [a, b], bias, rank, scaling) in wanted {
            let delta = Arc::new(LowRank { a: tensor(&a), b: tensor(&b), diagonal: None });
            let module = Module {
                delta,
                scale: None,
                bias: bias.map(|name| tensor(&name)),
                rank,
                alpha: scaling * rank as f64,
                scaling,
                ..module
            };
            modules.insert(module.key.clone(), module);
        }
        Ok(modules)
    }
}
