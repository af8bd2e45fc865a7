//! What an update adds, in numbers: the one place where an adapter's tensors become the two factors
//! of a product on a stored weight, whoever computes it then.

use std::borrow::Cow;
use std::ops::Range;

use crate::adapter::{Adapter, Form, Module};
use crate::dtype::Dtype;
use crate::kernel::convert::widen_f64;
use crate::kernel::{Operand, Orientation};
use crate::plan::{Expert, Update, UpdateKind};
use crate::safetensors::TensorInfo;

/// The A of a vector that is added: a vector is a product with one column.
const ONE: [u8; 4] = 1f32.to_le_bytes();

/// The two factors of one product B·A, row-major, little-endian.
#[derive(Debug, Clone)]
pub struct Pair<'a> {
    /// A, (rank, inputs).
    pub a: Cow<'a, [u8]>,
    /// The element type of A.
    pub a_dtype: Dtype,
    /// B, (outputs, rank).
    pub b: Cow<'a, [u8]>,
    /// The element type of B.
    pub b_dtype: Dtype,
    /// The common extent.
    pub rank: usize,
    /// Rows of B.
    pub outputs: usize,
    /// Columns of A.
    pub inputs: usize,
}

impl<'a> Pair<'a> {
    /// The factors that an update multiplies, cut to its part. They do not hold its scale.
    ///
    /// # Panics
    /// For a replacement, or if the adapter is not the one that the update was planned from.
    pub fn of(adapter: &'a Adapter, update: &Update) -> Self {
        let module = &adapter.modules()[&update.module];
        Self::from_bytes(module, update, &|tensor| adapter.file().tensor_bytes(tensor))
    }

    /// The same of a module of which `read` has the bytes of every tensor.
    ///
    /// # Panics
    /// As [`Pair::of`].
    pub fn from_bytes(
        module: &Module,
        update: &Update,
        read: &dyn Fn(&TensorInfo) -> &'a [u8],
    ) -> Self {
        let bytes = |tensor: &TensorInfo| Cow::Borrowed(read(tensor));
        let whole = match update.kind {
            UpdateKind::LowRank | UpdateKind::Dora => Self {
                a: bytes(&module.a),
                a_dtype: module.a.dtype.clone(),
                b: bytes(&module.b),
                b_dtype: module.b.dtype.clone(),
                rank: module.a.shape[0] as usize,
                outputs: module.outputs() as usize,
                inputs: module.inputs() as usize,
            }
            .unfolded(module, read),
            UpdateKind::Vector => {
                let bias = module.bias.as_ref().expect("planned from its bias");
                Self {
                    a: Cow::Borrowed(&ONE),
                    a_dtype: Dtype::F32,
                    b: bytes(bias),
                    b_dtype: bias.dtype.clone(),
                    rank: 1,
                    outputs: bias.elements() as usize,
                    inputs: 1,
                }
            }
            UpdateKind::Replace => unreachable!("a replacement is no product"),
        };
        // Whole rows of B are cut without a copy, an expert's columns with one.
        let cut = match &update.part.outputs {
            Some(outputs) => whole.outputs(outputs.start as usize..outputs.end as usize),
            None => whole,
        };
        let one = match update.part.expert {
            Some(expert) => cut.expert(expert),
            None => cut,
        };
        match &update.part.inputs {
            Some(inputs) => one.inputs(inputs.start as usize..inputs.end as usize),
            None => one,
        }
    }

    /// The factors of a form in which the file leaves the zeros out, written out.
    fn unfolded(mut self, module: &Module, read: &dyn Fn(&TensorInfo) -> &'a [u8]) -> Self {
        match &module.form {
            Form::Plain | Form::Experts => {}
            Form::BlocksOfA(blocks) => {
                self.a = self.blocks(&self.a, &self.a_dtype, *blocks as usize, self.rank);
            }
            Form::BlocksOfB(blocks) => {
                self.b = self.blocks(&self.b, &self.b_dtype, *blocks as usize, self.outputs);
            }
            Form::Parts(parts) => self.b = self.parts(module, parts),
        }
        if let Some(diagonal) = &module.diagonal {
            // The product of two numbers of 32 bits is exact in 64.
            let diagonal = widen_f64(&diagonal.dtype, read(diagonal));
            let mut a = widen_f64(&self.a_dtype, &self.a);
            for (row, factor) in a.chunks_exact_mut(self.inputs).zip(diagonal) {
                row.iter_mut().for_each(|value| *value *= factor);
            }
            self.a = Cow::Owned(a.iter().flat_map(|value| value.to_le_bytes()).collect());
            self.a_dtype = Dtype::F64;
        }
        self
    }

    /// A matrix of `rows` rows that are equal blocks below one another, with the blocks on its
    /// diagonal.
    fn blocks(&self, stored: &[u8], dtype: &Dtype, count: usize, rows: usize) -> Cow<'a, [u8]> {
        let size = dtype.size();
        let width = stored.len() / size / rows;
        let mut whole = vec![0; rows * count * width * size];
        let lines = whole.chunks_exact_mut(count * width * size);
        for (row, (to, from)) in lines.zip(stored.chunks_exact(width * size)).enumerate() {
            let block = row / (rows / count);
            to[block * width * size..(block + 1) * width * size].copy_from_slice(from);
        }
        Cow::Owned(whole)
    }

    /// MergedLinear's B: the rows of its groups, each beside its own rows of A, at the outputs of
    /// the parts that have factors.
    fn parts(&self, module: &Module, parts: &[bool]) -> Cow<'a, [u8]> {
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
        Cow::Owned(whole)
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

    fn expert(self, Expert { index, count }: Expert) -> Self {
        let (index, count) = (index as usize, count as usize);
        let rank = self.rank / count;
        let a_rows = self.inputs * self.a_dtype.size();
        let a = cut(self.a, index * rank * a_rows..(index + 1) * rank * a_rows);
        let size = self.b_dtype.size();
        let mut b = Vec::with_capacity(self.outputs * rank * size);
        for row in self.b.chunks_exact(self.rank * size) {
            for k in 0..rank {
                let start = (k * count + index) * size;
                b.extend_from_slice(&row[start..start + size]);
            }
        }
        Self { a, b: Cow::Owned(b), rank, ..self }
    }

    fn outputs(self, rows: Range<usize>) -> Self {
        let row = self.rank * self.b_dtype.size();
        let outputs = rows.len();
        Self { b: cut(self.b, rows.start * row..rows.end * row), outputs, ..self }
    }

    fn inputs(self, columns: Range<usize>) -> Self {
        if columns.len() == self.inputs {
            return self;
        }
        let size = self.a_dtype.size();
        let row = self.inputs * size;
        let cut = columns.start * size..columns.end * size;
        let a = self.a.chunks_exact(row).flat_map(|row| &row[cut.clone()]).copied().collect();
        Self { a: Cow::Owned(a), inputs: columns.len(), ..self }
    }
}

fn cut(bytes: Cow<'_, [u8]>, range: Range<usize>) -> Cow<'_, [u8]> {
    match bytes {
        Cow::Borrowed(bytes) => Cow::Borrowed(&bytes[range]),
        Cow::Owned(mut bytes) => {
            bytes.truncate(range.end);
            bytes.drain(..range.start);
            Cow::Owned(bytes)
        }
    }
}
