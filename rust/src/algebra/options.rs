//! How the results of computations with adapters are written.

use serde::Deserialize;

use crate::error::Result;
use crate::tensor::dtype::Dtype;

/// How a result is written.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Writing {
    /// The name of the format; PEFT's if there is none.
    pub to: Option<String>,
    /// The element type of the factors; the widest of the inputs' if it is `auto` or none.
    pub dtype: Option<String>,
    /// Whether files of an adapter that is there already may be replaced.
    pub overwrite: bool,
    /// Worker threads; one for each core if there is no number.
    pub threads: Option<usize>,
    /// Whether everything is computed and nothing written.
    pub dry_run: bool,
    /// Whether it is left to the system when the files come to the disk.
    pub unsynced: bool,
}

impl Writing {
    /// The name of the format.
    ///
    /// # Errors
    /// [`Error::Argument`] never by itself; a conversion knows the formats.
    pub(crate) fn target(&self) -> Result<&str> {
        Ok(self.to.as_deref().unwrap_or("peft"))
    }

    /// The element type that was asked for.
    ///
    /// # Errors
    /// [`Error::Argument`] for one that factors are not written in.
    pub(crate) fn dtype(&self) -> Result<Option<Dtype>> {
        let name = self.dtype.as_deref().filter(|name| *name != "auto");
        name.map(crate::convert::element_type).transpose()
    }
}
