//! Element types of safetensors files.

use std::fmt;
use std::sync::Arc;

use serde::{Serialize, Serializer};

/// The element type of a tensor. Only the floating-point types named here are ever computed with;
/// every other one, known or not, is carried through as bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE binary64.
    F64,
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    Bf16,
    /// Anything else, by the name that stands in the file.
    Other(Arc<str>),
}

impl Dtype {
    /// The type of that name in a safetensors header.
    pub fn from_name(name: &str) -> Self {
        match name {
            "F64" => Self::F64,
            "F32" => Self::F32,
            "F16" => Self::F16,
            "BF16" => Self::Bf16,
            other => Self::Other(other.into()),
        }
    }

    /// The name in a safetensors header.
    pub fn name(&self) -> &str {
        match self {
            Self::F64 => "F64",
            Self::F32 => "F32",
            Self::F16 => "F16",
            Self::Bf16 => "BF16",
            Self::Other(name) => name,
        }
    }

    /// Bits in one element, or `None` for a type that this version does not know.
    pub fn bits(&self) -> Option<u64> {
        Some(match self {
            Self::F64 => 64,
            Self::F32 => 32,
            Self::F16 | Self::Bf16 => 16,
            Self::Other(name) => match &**name {
                "C64" | "I64" | "U64" => 64,
                "I32" | "U32" => 32,
                "I16" | "U16" => 16,
                "BOOL" | "I8" | "U8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" | "F8_E4M3FNUZ"
                | "F8_E5M2FNUZ" => 8,
                "F6_E2M3" | "F6_E3M2" => 6,
                "F4" | "I4" | "U4" => 4,
                _ => return None,
            },
        })
    }

    /// Whether a merge can compute in this type, and a cast read or write it.
    pub fn is_mergeable(&self) -> bool {
        !matches!(self, Self::Other(_))
    }

    /// Bytes in one element of a mergeable type.
    ///
    /// # Panics
    /// For a type that is not mergeable: ask [`Dtype::is_mergeable`] first.
    pub fn size(&self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Other(name) => panic!("the size of a {name} element was asked for"),
        }
    }

    /// The name that transformers and torch use in a config (`"bfloat16"`), for mergeable types.
    pub fn torch_name(&self) -> Option<&'static str> {
        match self {
            Self::F64 => Some("float64"),
            Self::F32 => Some("float32"),
            Self::F16 => Some("float16"),
            Self::Bf16 => Some("bfloat16"),
            Self::Other(_) => None,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

impl Serialize for Dtype {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}
