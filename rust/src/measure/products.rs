//! The products that an adapter's modules add, read as they are measured.

use std::borrow::Cow;
use std::ops::Range;

use crate::adapter::factors::Pair;
use crate::adapter::zero::{self, ZeroCause};
use crate::adapter::{Adapter, Expert, Module};
use crate::error::Result;
use crate::measure::spectrum::{Spectrum, Update, Values};
use crate::measure::statistics::{ElementType, Tensor};
use crate::tensor::dtype::Dtype;

/// One of the products that a module holds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Product<'a> {
    pub module: &'a Module,
    /// Which of several.
    pub expert: Option<Expert>,
}

/// All products of an adapter, in its order.
pub(crate) fn products_of(adapter: &Adapter) -> Vec<Product<'_>> {
    let modules = adapter.modules().values();
    modules
        .flat_map(|module| module.products().map(move |expert| Product { module, expert }))
        .collect()
}

impl<'a> Product<'a> {
    /// What it is called: its module's path, with the index of an expert. A parameter of experts is
    /// named by its wrappers, which its module's path leaves out.
    pub fn name(self) -> String {
        let Module { parameters, key, .. } = self.module;
        let title = self.module.title();
        let path: &str = if parameters.is_empty() { &title } else { key };
        match self.expert {
            Some(Expert { index, .. }) => format!("{path}[{index}]"),
            None => path.to_owned(),
        }
    }

    /// (m, n, r) of s·B·A, both factors flattened to matrices.
    pub fn extents(self) -> (usize, usize, usize) {
        let module = self.module;
        let rank = module.product_rank(module.rank);
        (module.outputs() as usize, module.inputs() as usize, rank as usize)
    }

    /// The rank as trainers call it, which of a composed product is not that of its factors.
    pub fn stored_rank(self) -> usize {
        match self.module.delta.is_expanded() {
            true => self.module.rank as usize,
            false => self.extents().2,
        }
    }

    /// The spectrum of its update, whose factors these are unless the product tells it in a cheaper way.
    ///
    /// # Errors
    /// As [`Product::read`].
    pub fn spectrum(self, update: &Update<'_>) -> Result<Spectrum> {
        Ok(match self.kronecker_spectrum()? {
            Some(spectrum) => spectrum,
            None => Spectrum::of(update),
        })
    }

    /// The spectrum of a Kronecker product, whose singular values are the products of those of both
    /// sides.
    ///
    /// # Errors
    /// As [`Product::read`].
    pub fn kronecker_spectrum(self) -> Result<Option<Spectrum>> {
        let Some(sides) = self.module.delta.kronecker()? else { return Ok(None) };
        let mut spectra = Vec::with_capacity(2);
        for Pair { a, a_dtype, b, b_dtype, rank, outputs, inputs } in &sides {
            let left = Values::Stored(Tensor::new(b, element(b_dtype))?);
            let right = Values::Stored(Tensor::new(a, element(a_dtype))?);
            spectra.push(Spectrum::of(&Update::new(*outputs, *inputs, *rank, left, right, 1.0)?));
        }
        let (rows, columns, _) = self.extents();
        let scaling = self.scaling();
        let other = &spectra[1].singular_values;
        let size = scaling.abs();
        let first = spectra[0].singular_values.iter().copied();
        let products = first.flat_map(|value| other.iter().map(move |other| size * value * other));
        let mut values: Vec<f64> = products.collect();
        values.sort_unstable_by(|x, y| y.total_cmp(x));
        let mean = scaling * spectra[0].entry_mean * spectra[1].entry_mean;
        Ok(Some(Spectrum::from_values(rows, columns, values, mean)))
    }

    /// s of s·B·A as it is added to the weight.
    pub fn scaling(self) -> f64 {
        // Of an update whose scale nothing tells, what does not depend on it.
        let scaling = if self.module.scaling.is_nan() { 1.0 } else { self.module.scaling };
        scaling * self.module.repeats()
    }

    /// Why it changes nothing, in words, where its norm is zero; `None` where it changes something.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    pub fn zero_cause(self, adapter: &Adapter, spectral_norm: f64) -> Result<Option<String>> {
        // A merge asks of every module, and would read what was measured here again.
        if spectral_norm != 0.0 {
            return Ok(None);
        }
        let cause = zero::cause_of_product(adapter, self.module, self.expert)?;
        Ok(cause.map(ZeroCause::describe))
    }

    /// Bytes of its factors.
    pub fn bytes(self) -> u64 {
        let tensors = self.module.delta.tensors();
        let all: u64 = tensors.iter().map(|(_, tensor)| tensor.bytes()).sum();
        all / self.expert.map_or(1, |expert| expert.count)
    }

    /// Its factors in memory of their own.
    ///
    /// # Errors
    /// As [`Product::read`].
    pub fn read_owned(self) -> Result<Factors<'static>> {
        let Some((a, b)) = self.module.delta.plain() else {
            return Ok(self.read(&mut Vec::new())?.into_owned());
        };
        let elements = [element(&b.dtype), element(&a.dtype)];
        let (extents, scaling) = (self.extents(), self.scaling());
        Ok(Factors { extents, scaling, elements, b: b.read()?.into(), a: a.read()?.into() })
    }

    /// Whether another product is stored as the same two factors with the same scale, bit for bit. They are
    /// held against each other piece by piece.
    ///
    /// # Errors
    /// As [`Product::read`].
    pub fn is_stored_as(self, other: Product<'_>) -> Result<bool> {
        let (own, others) = (self.module.delta.plain(), other.module.delta.plain());
        let (Some((a, b)), Some((other_a, other_b))) = (own, others) else { return Ok(false) };
        let is_alike = (self.extents(), self.scaling()) == (other.extents(), other.scaling())
            && (&a.dtype, &b.dtype) == (&other_a.dtype, &other_b.dtype);
        Ok(is_alike && a.has_same_bytes(other_a)? && b.has_same_bytes(other_b)?)
    }

    /// Its factors, in a buffer that grows as needed, or in one of their own.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    pub fn read<'b>(self, room: &'b mut Vec<u8>) -> Result<Factors<'b>> {
        let (extents, scaling) = (self.extents(), self.scaling());
        let Some((stored_a, stored_b)) = self.module.delta.plain() else {
            let Pair { a, a_dtype, b, b_dtype, .. } = self.module.pair(self.expert, None, None)?;
            let elements = [element(&b_dtype), element(&a_dtype)];
            return Ok(Factors { extents, scaling, elements, b: b.into(), a: a.into() });
        };
        let elements = [element(&stored_b.dtype), element(&stored_a.dtype)];
        let (first, all) = (stored_b.bytes() as usize, self.bytes() as usize);
        if room.len() < all {
            room.resize(all, 0);
        }
        let (b, a) = room[..all].split_at_mut(first);
        stored_b.read_into(0, b)?;
        stored_a.read_into(0, a)?;
        let (b, a) = (Cow::Borrowed(&*b), Cow::Borrowed(&*a));
        Ok(Factors { extents, scaling, elements, b, a })
    }
}

fn element(dtype: &Dtype) -> ElementType {
    ElementType::from_dtype(dtype).expect("factors are of floating-point types")
}

/// The factors of a product, read.
pub(crate) struct Factors<'b> {
    extents: (usize, usize, usize),
    scaling: f64,
    elements: [ElementType; 2],
    b: Cow<'b, [u8]>,
    a: Cow<'b, [u8]>,
}

impl Factors<'_> {
    /// The same in memory of their own.
    pub fn into_owned(self) -> Factors<'static> {
        let Factors { extents, scaling, elements, b, a } = self;
        Factors { extents, scaling, elements, b: b.into_owned().into(), a: a.into_owned().into() }
    }

    /// Whether another product has the same factors and the same scale, bit for bit.
    pub fn is_same(&self, other: &Factors<'_>) -> bool {
        (self.extents, self.scaling) == (other.extents, other.scaling)
            && self.elements == other.elements
            && (self.a == other.a && self.b == other.b)
    }

    /// The update that they make.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] never: the shapes are those of the tensors.
    pub fn update(&self) -> Result<Update<'_>> {
        let (rows, columns, rank) = self.extents;
        let left = Values::Stored(Tensor::new(&self.b, self.elements[0])?);
        let right = Values::Stored(Tensor::new(&self.a, self.elements[1])?);
        Update::new(rows, columns, rank, left, right, self.scaling)
    }

    /// The factors of a part of the product, which may be transposed first: (B, A) in f64.
    ///
    /// # Errors
    /// As [`Factors::update`].
    pub fn part(&self, is_transposed: bool, outputs: Option<&Range<u64>>) -> Result<PartFactors> {
        let (rows, columns, rank) = self.extents;
        let read = |bytes: &[u8], element, length| -> Result<Vec<f64>> {
            let mut values = vec![0.0; length];
            Values::Stored(Tensor::new(bytes, element)?).read(0, &mut values);
            Ok(values)
        };
        let mut b = read(&self.b, self.elements[0], rows * rank)?;
        let mut a = read(&self.a, self.elements[1], rank * columns)?;
        let mut shape = [rows, columns];
        if is_transposed {
            (b, a) = (transposed(&a, rank), transposed(&b, rows));
            shape.reverse();
        }
        if let Some(outputs) = outputs {
            b = b[outputs.start as usize * rank..outputs.end as usize * rank].to_vec();
            shape[0] = (outputs.end - outputs.start) as usize;
        }
        Ok(PartFactors { shape, rank, scaling: self.scaling, b, a })
    }
}

/// The transpose of a row-major matrix of so many rows.
fn transposed(matrix: &[f64], rows: usize) -> Vec<f64> {
    let columns = matrix.len() / rows.max(1);
    let column = |column| (0..rows).map(move |row| matrix[row * columns + column]);
    (0..columns).flat_map(column).collect()
}

/// The factors of a part of a product.
pub(crate) struct PartFactors {
    shape: [usize; 2],
    rank: usize,
    scaling: f64,
    b: Vec<f64>,
    a: Vec<f64>,
}

impl PartFactors {
    /// The update that they make.
    ///
    /// # Errors
    /// As [`Factors::update`].
    pub fn update(&self) -> Result<Update<'_>> {
        let [rows, columns] = self.shape;
        let (left, right) = (Values::F64(&self.b), Values::F64(&self.a));
        Update::new(rows, columns, self.rank, left, right, self.scaling)
    }
}
