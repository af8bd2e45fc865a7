//! Updates: what one adapter does to one tensor.

use std::ops::Range;

use serde::Serialize;

use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::adapter::{Adapter, Expert};
use crate::error::{Error, Result};
use crate::tensor::orientation::Orientation;

/// Which way a product lies on the weight of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertLayout {
    /// As B·A: the factors take the weight as (out, in).
    Straight,
    /// As (B·A)ᵀ: they take it as (in, out).
    Transposed,
}

impl ExpertLayout {
    /// The layout of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "straight" => Ok(Self::Straight),
            "transposed" => Ok(Self::Transposed),
            _ => Err(Error::Argument(format!(
                "unknown expert layout {name:?}; there are straight and transposed"
            ))),
        }
    }
}

/// One low-rank update of one tensor.
#[derive(Debug, Clone, Serialize)]
pub struct Update {
    /// Which adapter, by its position.
    pub adapter: usize,
    /// The adapter's module, or for a replacement the tensor in its file.
    pub module: String,
    /// What the update does.
    pub kind: UpdateKind,
    /// The rank; 1 for a vector, 0 for a replacement.
    pub rank: u64,
    /// s of s·B·A: α/r, or α/√r for rsLoRA; 1 for a replacement.
    pub scale: f64,
    /// The adapter's weight under the strategy.
    pub weight: f64,
    /// Whether the base stores the weight (in, out), so that the product is transposed.
    pub transposed: bool,
    /// The slice of the module's product that it is, and where it lies.
    #[serde(skip_serializing_if = "Slice::is_whole")]
    #[serde(rename = "part")]
    pub slice: Slice,
    /// The adapter's tensor that it is made from, where that overrides W₀.
    #[serde(rename = "on", skip_serializing_if = "Option::is_none")]
    pub base_override: Option<String>,
    /// What the adapter's initialisation took out of W₀, which it was trained without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
    /// Updates are made from what those of all lower stages leave. There is one stage but where
    /// adapters are merged in sequence and one of them does more than add.
    #[serde(skip_serializing_if = "is_zero")]
    pub stage: usize,
}

fn is_zero(stage: &usize) -> bool {
    *stage == 0
}

/// A slice of a module's product, and the rows of the stored tensor on which it lies: experts that
/// are stored as one tensor, modules that are stored fused or split. The default is the whole product
/// on the whole tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Slice {
    /// The expert, where the module's factors hold those of all experts.
    pub expert: Option<Expert>,
    /// The outputs of the product that are used: rows of B, or rows of a replacement.
    pub outputs: Option<Range<u64>>,
    /// The inputs of the product that are used: columns of A.
    pub inputs: Option<Range<u64>>,
    /// The rows of the stored tensor that are changed, its leading dimensions taken as one.
    pub rows: Option<Range<u64>>,
}

impl Slice {
    /// Whether it is the whole product on the whole tensor.
    pub fn is_whole(&self) -> bool {
        *self == Self::default()
    }
}

/// What an initialisation took out of W₀; the rank is the update's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// The largest singular components (PiSSA; Meng et al. 2024, arXiv:2404.02948).
    Largest,
    /// The smallest singular components (KaSA; Wang et al. 2024, arXiv:2412.06071).
    Smallest,
    /// s·Q·R of the first columns' QR decomposition (OLoRA; Büyükakyüz 2024, arXiv:2406.01775).
    Leading,
}

impl Residual {
    /// The factor on the product that was taken out, of an update with the scale s.
    pub fn scale(self, scale: f64) -> f64 {
        match self {
            Self::Largest | Self::Smallest => 1.0,
            Self::Leading => scale,
        }
    }
}

/// What an update does to W₀, the base's weight or what the stages before left of it. With several
/// updates of one stage the result is W₀ + Σ wᵢ·(Wᵢ − W₀), each Wᵢ made from W₀ alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateKind {
    /// W₀ + s·B·A.
    LowRank,
    /// m/‖V‖ ⊙ V with V = W₀ + s·B·A, a norm for each output (Liu et al. 2024, arXiv:2402.09353).
    Dora,
    /// b₀ + s·b, with the bias of B.
    Vector,
    /// The adapter's own tensor.
    Replace,
    /// f(W₀), made of the whole weight: GLoRA, IA³, orthogonal blocks, DoRA of the inputs.
    Transform,
}

impl UpdateKind {
    /// Whether Wᵢ is more than W₀ with something added.
    pub fn is_override(self) -> bool {
        matches!(self, Self::Dora | Self::Replace | Self::Transform)
    }
}

impl Update {
    /// An update of a whole tensor from an adapter's module or, for a replacement, from its tensor
    /// of that name; of rank 0 and scale 1, in the only stage.
    pub fn new(adapter: usize, source: impl Into<String>, kind: UpdateKind, weight: f64) -> Self {
        Self {
            adapter,
            module: source.into(),
            kind,
            rank: 0,
            scale: 1.0,
            weight,
            transposed: false,
            slice: Slice::default(),
            base_override: None,
            residual: None,
            stage: 0,
        }
    }

    /// The factor on B·A.
    pub fn coefficient(&self) -> f64 {
        self.scale * self.weight
    }

    /// The factors that it multiplies, read and cut to its slice. They do not hold its scale.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if the file changed meanwhile, [`crate::Error::Io`].
    ///
    /// # Panics
    /// For what is no product, or if the adapter is not the one that the update was planned from.
    pub fn pair(&self, adapter: &Adapter) -> Result<Pair> {
        let module = &adapter.modules()[&self.module];
        let Slice { expert, outputs, inputs, .. } = &self.slice;
        match self.kind {
            UpdateKind::LowRank | UpdateKind::Dora => {
                module.pair(*expert, outputs.as_ref(), inputs.as_ref())
            }
            UpdateKind::Vector => {
                let bias = module.bias.as_ref().expect("planned from its bias");
                Pair::vector(bias, outputs.as_ref())
            }
            UpdateKind::Replace | UpdateKind::Transform => unreachable!("it is no product"),
        }
    }

    /// Makes of the rows on which it lies what it makes of them: all of them, as they are stored.
    /// Where it lies on some of its module's outputs alone, the rows are these.
    ///
    /// # Errors
    /// As [`Update::pair`].
    ///
    /// # Panics
    /// If it is no transform of that adapter.
    pub fn transform(&self, adapter: &Adapter, weight: &mut Matrix) -> Result<()> {
        let module = &adapter.modules()[&self.module];
        let transform = module.delta.transform().expect("planned from it");
        let outputs = self.slice.outputs.as_ref();
        match self.orientation() {
            Orientation::OutIn => transform.apply(weight, self.scale, outputs),
            Orientation::InOut => {
                let mut turned = weight.transposed();
                transform.apply(&mut turned, self.scale, outputs)?;
                *weight = turned.transposed();
                Ok(())
            }
        }
    }

    /// Which way the product lies.
    pub fn orientation(&self) -> Orientation {
        if self.transposed { Orientation::InOut } else { Orientation::OutIn }
    }
}
