//! The factors that are made, in the type in which they are written, on disk until then.

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;

use super::factored::{Factors, Rows};
use super::stacks;
use super::streamed::Layout;
use super::sums::{Layer, Sum};
use crate::adapter::deltas::LowRank;
use crate::adapter::{Expert, Module};
use crate::error::{Owner, Result};
use crate::kernel::convert::{convert, widen_f64, widen_f64_into};
use crate::kernel::vector::vectorized;
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

/// What was written of a module, or of one of its experts: its place, and the scale that it has.
#[derive(Debug)]
pub(crate) struct Written {
    module: Module,
    expert: Option<Expert>,
    outputs: u64,
    inputs: Vec<u64>,
    place: Place,
    scaling: f64,
}

impl Written {
    /// What was written of a sum.
    pub fn of(sum: &Sum<'_>, place: Place, scaling: f64) -> Self {
        let Layer { kind, inputs, .. } = sum.layer.clone();
        let module = Module { kind, ..sum.module.clone() };
        Self { module, expert: sum.expert, outputs: sum.outputs(), inputs, place, scaling }
    }
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

    /// What rounding these factors lost at most of their product: ‖E_B‖‖A′‖ + ‖B‖‖E_A‖.
    pub fn rounding_bound(&self, exact: &Factors) -> f64 {
        let norms = |bytes: &[u8], exact: &Rows| {
            let size = self.dtype.size();
            let mut now = vec![0.0; PIECE.min(exact.values.len())];
            let mut sums = [0.0; 3];
            for (exact, bytes) in exact.values.chunks(PIECE).zip(bytes.chunks(PIECE * size)) {
                let now = &mut now[..exact.len()];
                widen_f64_into(&self.dtype, bytes, now);
                let squares = sums_of_squares(exact, now);
                sums.iter_mut().zip(squares).for_each(|(sum, square)| *sum += square);
            }
            sums.map(f64::sqrt)
        };
        let [b, _, b_lost] = norms(&self.b, &exact.b);
        let [_, a_now, a_lost] = norms(&self.a, &exact.a);
        b_lost * a_now + b * a_lost
    }

    /// The factors as they are now, of the shape of those that they were.
    pub fn factors(&self, exact: &Factors) -> Factors {
        let of =
            |bytes: &[u8], exact: &Rows| Rows { values: widen_f64(&self.dtype, bytes), ..*exact };
        Factors { b: of(&self.b, &exact.b), a: of(&self.a, &exact.a) }
    }
}

/// Numbers that are widened together.
const PIECE: usize = 1 << 12;

vectorized! {
    /// Σx², Σy² and Σ(x − y)².
    fn sums_of_squares(one: &[f64], other: &[f64]) -> [f64; 3] {
        let mut lanes = [[0.0; 8]; 3];
        let mut add = |one: &[f64], other: &[f64]| {
            for (lane, (x, y)) in one.iter().zip(other).enumerate() {
                let difference = x - y;
                lanes[0][lane] += x * x;
                lanes[1][lane] += y * y;
                lanes[2][lane] += difference * difference;
            }
        };
        let ((pieces, rest), (others, rest_of_others)) =
            (one.as_chunks::<8>(), other.as_chunks::<8>());
        pieces.iter().zip(others).for_each(|(one, other)| add(one, other));
        add(rest, rest_of_others);
        lanes.map(|lanes| lanes.iter().sum())
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

    /// Takes the factors of a layout as they are made, and a bias in their type: their place, and what
    /// rounding lost of them; `None` if a number is none in their type.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn put_layout(
        &self,
        layout: &Layout<'_>,
        bias: Option<&[u8]>,
    ) -> Result<Option<(Place, f64)>> {
        let b = self.file.reserve(layout.bytes());
        let mut end = b;
        let lost = layout.write(&mut |bytes| {
            self.file.write(bytes, end)?;
            end += bytes.len() as u64;
            Ok(())
        })?;
        let bias = bias.map(|bias| self.file.append(&[bias])).transpose()?;
        let (rank, dtype) = (layout.rank() as u64, layout.dtype().clone());
        let place = Place { rank, dtype, b, a: b + layout.left_bytes(), bias };
        Ok(lost.map(|lost| (place, lost)))
    }

    /// The modules whose factors were put, each like the one that it is given with, with a scale of s.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn modules(&self, made: Vec<Written>) -> Result<IndexMap<String, Module>> {
        let mut header = Header::default();
        let mut wanted = Vec::with_capacity(made.len());
        let mut stacks = IndexMap::<String, Vec<Written>>::new();
        for one in made {
            if one.expert.is_some() {
                stacks.entry(one.module.key.clone()).or_default().push(one);
                continue;
            }
            let Written { module, outputs, inputs, place, scaling, .. } = one;
            let mut a_shape = vec![place.rank];
            a_shape.extend(inputs);
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
        let mut of_experts = Vec::with_capacity(stacks.len());
        for (key, experts) in stacks {
            of_experts.push(self.stack(&key, experts, &mut header)?);
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
        for (like, factors, scaling) in of_experts {
            let module = stacks::module(&like, factors.map(|name| tensor(&name)), scaling)?;
            modules.insert(module.key.clone(), module);
        }
        Ok(modules)
    }

    /// Puts the factors of several experts one after the other, with zeros up to the largest rank: the names
    /// of both stacks.
    fn stack(
        &self,
        key: &str,
        experts: Vec<Written>,
        header: &mut Header,
    ) -> Result<(Module, [String; 2], f64)> {
        let Written { module, scaling, .. } = &experts[0];
        let (like, scaling) = (module.clone(), *scaling);
        let count = module.products().count() as u64;
        let (outputs, inputs) = (module.outputs(), module.inputs());
        let rank = experts.iter().map(|one| one.place.rank).max().unwrap_or(0);
        let dtype = experts[0].place.dtype.clone();
        let size = dtype.size() as u64;
        let place_of = |index: u64| {
            let is = |one: &&Written| one.expert.is_some_and(|expert| expert.index == index);
            experts.iter().find(is).map(|one| &one.place)
        };
        let mut starts = [0; 2];
        for (slot, extent) in [inputs, outputs].into_iter().enumerate() {
            for index in 0..count {
                let mut padded = vec![0; (rank * extent * size) as usize];
                if let Some(place) = place_of(index) {
                    let start = if slot == 0 { place.a } else { place.b };
                    let own = self.file.read(start, (place.rank * extent * size) as usize)?;
                    // Rows of A are whole; of B each has room for the largest rank.
                    let (from, to) = match slot {
                        0 => (own.len(), padded.len()),
                        _ => ((place.rank * size) as usize, (rank * size) as usize),
                    };
                    for (target, source) in
                        padded.chunks_exact_mut(to.max(1)).zip(own.chunks_exact(from.max(1)))
                    {
                        target[..from].copy_from_slice(source);
                    }
                }
                let start = self.file.append(&[&padded])?;
                if index == 0 {
                    starts[slot] = start;
                }
            }
        }
        let mut add = |what: &str, shape: Vec<u64>, start: u64| {
            let bytes = shape.iter().product::<u64>() * size;
            let name = format!("{key}.{what}");
            let (dtype, range) = (dtype.clone(), start..start + bytes);
            header.tensors.push(TensorInfo { name: name.clone(), dtype, shape, range });
            name
        };
        let a = add("experts.a", vec![count, rank, inputs], starts[0]);
        let b = add("experts.b", vec![count, outputs, rank], starts[1]);
        Ok((like, [a, b], scaling))
    }
}
