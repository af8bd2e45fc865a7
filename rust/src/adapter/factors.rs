//! What an update adds, in numbers: the one place where an adapter's tensors become the two factors
//! of a product on a stored weight, whoever computes it then.

use std::ops::Range;

use crate::adapter::{Adapter, Form, Module};
use crate::error::Result;
use crate::kernel::Operand;
use crate::kernel::convert::widen_f64;
use crate::plan::{Expert, Update, UpdateKind};
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::TensorInfo;

/// The A of a vector that is added: a vector is a product with one column.
const ONE: [u8; 4] = 1f32.to_le_bytes();

/// The two factors of one product B·A, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct Pair {
    /// A, (rank, inputs).
    pub a: Vec<u8>,
    /// The element type of A.
    pub a_dtype: Dtype,
    /// B, (outputs, rank).
    pub b: Vec<u8>,
    /// The element type of B.
    pub b_dtype: Dtype,
    /// The common extent.
    pub rank: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Columns of A.
    pub inputs: usize,
}

impl Pair {
    /// The factors that an update multiplies, read and cut to its part. They do not hold its scale.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if the file changed meanwhile, [`crate::Error::Io`].
    ///
    /// # Panics
    /// For a replacement, or if the adapter is not the one that the update was planned from.
    pub fn of(adapter: &Adapter, update: &Update) -> Result<Self> {
        let module = &adapter.modules()[&update.module];
        let outputs = update.part.outputs.as_ref();
        let pair = match (update.kind, update.part.expert) {
            (UpdateKind::LowRank | UpdateKind::Dora, None) => {
                Self::of_module(adapter, module, outputs)?
            }
            (UpdateKind::LowRank | UpdateKind::Dora, Some(expert)) => {
                Self::of_expert(adapter, module, expert, outputs)?
            }
            (UpdateKind::Vector, _) => {
                let bias = module.bias.as_ref().expect("planned from its bias");
                let rows = outputs.cloned().unwrap_or(0..bias.elements());
                Self {
                    a: ONE.to_vec(),
                    a_dtype: Dtype::F32,
                    b: read_rows(adapter, bias, 1, &rows)?,
                    b_dtype: bias.dtype.clone(),
                    rank: 1,
                    outputs: (rows.end - rows.start) as usize,
                    inputs: 1,
                }
            }
            (UpdateKind::Replace, _) => unreachable!("a replacement is no product"),
        };
        Ok(match &update.part.inputs {
            Some(inputs) => pair.inputs(inputs.start as usize..inputs.end as usize),
            None => pair,
        })
    }

    /// A module's factors, or some outputs of its product.
    fn of_module(adapter: &Adapter, module: &Module, outputs: Option<&Range<u64>>) -> Result<Self> {
        let all = 0..module.outputs();
        let rows = outputs.unwrap_or(&all);
        let is_by_rows = !matches!(module.form, Form::BlocksOfB(_) | Form::Parts(_));
        let (b, outputs) = if is_by_rows {
            let width = module.b.shape[1..].iter().product();
            (read_rows(adapter, &module.b, width, rows)?, rows.end - rows.start)
        } else {
            (adapter.file().read(&module.b)?, module.outputs())
        };
        let pair = Self {
            a: adapter.file().read(&module.a)?,
            a_dtype: module.a.dtype.clone(),
            b,
            b_dtype: module.b.dtype.clone(),
            rank: module.a.shape[0] as usize,
            outputs: outputs as usize,
            inputs: module.inputs() as usize,
        };
        let pair = pair.unfolded(adapter, module)?;
        Ok(if is_by_rows { pair } else { pair.outputs(rows.start as usize..rows.end as usize) })
    }

    /// One expert's factors of those that a module holds together: of A its rows, of B its columns,
    /// which lie apart. So B is read whole, and kept for the next expert.
    fn of_expert(
        adapter: &Adapter,
        module: &Module,
        Expert { index, count }: Expert,
        outputs: Option<&Range<u64>>,
    ) -> Result<Self> {
        let (all_ranks, inputs) = (module.a.shape[0], module.inputs());
        let rank = all_ranks / count;
        let all = 0..module.outputs();
        let rows = outputs.unwrap_or(&all);
        let whole = adapter.read_shared(&module.b)?;
        let size = module.b.dtype.size();
        let row = all_ranks as usize * size;
        let mut b = Vec::with_capacity((rows.end - rows.start) as usize * rank as usize * size);
        for row in whole[rows.start as usize * row..rows.end as usize * row].chunks_exact(row) {
            for k in 0..rank {
                let start = (k * count + index) as usize * size;
                b.extend_from_slice(&row[start..start + size]);
            }
        }
        Ok(Self {
            a: read_rows(adapter, &module.a, inputs, &(index * rank..(index + 1) * rank))?,
            a_dtype: module.a.dtype.clone(),
            b,
            b_dtype: module.b.dtype.clone(),
            rank: rank as usize,
            outputs: (rows.end - rows.start) as usize,
            inputs: inputs as usize,
        })
    }

    /// The factors of a form in which the file leaves the zeros out, written out.
    fn unfolded(mut self, adapter: &Adapter, module: &Module) -> Result<Self> {
        match &module.form {
            Form::Plain | Form::Experts => {}
            Form::BlocksOfA(blocks) => {
                self.a = blocks_of(&self.a, &self.a_dtype, *blocks as usize, self.rank);
            }
            Form::BlocksOfB(blocks) => {
                self.b = blocks_of(&self.b, &self.b_dtype, *blocks as usize, self.outputs);
            }
            Form::Parts(parts) => self.b = self.parts(module, parts),
        }
        if let Some(diagonal) = &module.diagonal {
            // The product of two numbers of 32 bits is exact in 64.
            let diagonal = adapter.read_f64(diagonal)?;
            let mut a = widen_f64(&self.a_dtype, &self.a);
            for (row, factor) in a.chunks_exact_mut(self.inputs).zip(diagonal) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
            self.a = a.iter().flat_map(|value| value.to_le_bytes()).collect();
            self.a_dtype = Dtype::F64;
        }
        Ok(self)
    }

    /// MergedLinear's B: the rows of its groups, each beside its own rows of A, at the outputs of
    /// the parts that have factors.
    fn parts(&self, module: &Module, parts: &[bool]) -> Vec<u8> {
        let size = self.b_dtype.size();
        let (stored, width) = (module.b.shape[0] as usize, module.b.shape[1] as usize);
        let groups = self.rank / width;
        let height = self.outputs / parts.len();
        let enabled = parts.iter().enumerate().filter(|(_, enabled)| **enabled);
        let starts: Vec<_> = enabled.map(|(part, _)| part * height).collect();
        let mut whole = vec![0; self.outputs * self.rank * size];
        for (row, from) in self.b.chunks_exact(width * size).enumerate() {
            let output = starts[row / height] + row % height;
            let first = (output * self.rank + row / (stored / groups) * width) * size;
            whole[first..first + from.len()].copy_from_slice(from);
        }
        whole
    }

    /// The product's rows as they lie on a weight stored that way.
    pub fn stored_rows(self, orientation: Orientation, rows: Range<usize>) -> Self {
        match orientation {
            Orientation::OutIn => self.outputs(rows),
            Orientation::InOut => self.inputs(rows),
        }
    }

    /// As the kernels take it.
    pub fn operand(&self, coefficient: f64) -> Operand<'_> {
        Operand {
            a: &self.a,
            a_dtype: &self.a_dtype,
            b: &self.b,
            b_dtype: &self.b_dtype,
            rank: self.rank,
            coefficient,
        }
    }

    fn outputs(mut self, rows: Range<usize>) -> Self {
        if rows.len() < self.outputs {
            let row = self.rank * self.b_dtype.size();
            self.b.truncate(rows.end * row);
            self.b.drain(..rows.start * row);
            self.outputs = rows.len();
        }
        self
    }

    fn inputs(self, columns: Range<usize>) -> Self {
        if columns.len() == self.inputs {
            return self;
        }
        let size = self.a_dtype.size();
        let row = self.inputs * size;
        let cut = columns.start * size..columns.end * size;
        let a = self.a.chunks_exact(row).flat_map(|row| &row[cut.clone()]).copied().collect();
        Self { a, inputs: columns.len(), ..self }
    }
}

/// Some rows of a tensor that has `width` elements in each.
fn read_rows(
    adapter: &Adapter,
    tensor: &TensorInfo,
    width: u64,
    rows: &Range<u64>,
) -> Result<Vec<u8>> {
    let row = width * tensor.dtype.size() as u64;
    adapter.file().read_range(tensor, rows.start * row..rows.end * row)
}

/// A matrix of `rows` rows that are equal blocks below one another, with the blocks on its
/// diagonal.
fn blocks_of(stored: &[u8], dtype: &Dtype, count: usize, rows: usize) -> Vec<u8> {
    let size = dtype.size();
    let width = stored.len() / size / rows;
    let mut whole = vec![0; rows * count * width * size];
    let lines = whole.chunks_exact_mut(count * width * size);
    for (row, (to, from)) in lines.zip(stored.chunks_exact(width * size)).enumerate() {
        let block = row / (rows / count);
        to[block * width * size..(block + 1) * width * size].copy_from_slice(from);
    }
    whole
}
