//! The files of a run.

use std::path::{Path, PathBuf};

use crate::train::Error;

/// The files of an output folder.
#[derive(Debug, Clone)]
pub struct Folder(PathBuf);

impl Folder {
    /// The files of `path`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The configuration with all its defaults.
    pub fn config(&self) -> PathBuf {
        self.0.join("config.toml")
    }

    /// One line per logged step.
    pub fn metrics(&self) -> PathBuf {
        self.0.join("metrics.jsonl")
    }

    /// One line per evaluation, where there are some during training.
    pub fn evaluations(&self) -> PathBuf {
        self.0.join("evaluations.jsonl")
    }

    /// The parameters by name.
    pub fn model(&self) -> PathBuf {
        self.0.join("model.safetensors")
    }

    /// What a resumed run starts from.
    pub fn state(&self) -> PathBuf {
        self.0.join("train_state.safetensors")
    }

    /// Loss and accuracy against tokens.
    pub fn curves(&self) -> PathBuf {
        self.0.join("curves.png")
    }

    /// The last line on stdout.
    pub fn summary(&self) -> PathBuf {
        self.0.join("summary.json")
    }

    /// One head beside its target.
    pub fn attention(&self) -> PathBuf {
        self.0.join("attention.png")
    }

    /// What a supervised memory recalls beside its target.
    pub fn recall(&self) -> PathBuf {
        self.0.join("recall.png")
    }

    /// An adapter's parameters by name, as PEFT calls the file.
    pub fn adapter(&self) -> PathBuf {
        self.0.join("adapter_model.safetensors")
    }

    /// An adapter's settings, as PEFT calls the file.
    pub fn adapter_config(&self) -> PathBuf {
        self.0.join("adapter_config.json")
    }

    /// Makes a folder for something new.
    ///
    /// # Errors
    /// It holds a run, which is not to be replaced; or the system refuses.
    pub fn prepare(&self, overwrite: bool) -> Result<(), Error> {
        if !overwrite && self.is_used() {
            return Err(Error::Taken(self.0.clone()));
        }
        self.clear()?;
        std::fs::create_dir_all(&self.0).map_err(Error::io("create this folder", &self.0))
    }

    pub(super) fn is_used(&self) -> bool {
        self.files().iter().any(|file| file.exists())
    }

    pub(super) fn clear(&self) -> Result<(), Error> {
        for file in self.files().iter().filter(|file| file.exists()) {
            std::fs::remove_file(file).map_err(Error::io("remove it", file))?;
        }
        Ok(())
    }

    /// All of them; the state first, so that it never outlives what it belongs to.
    fn files(&self) -> [PathBuf; 11] {
        [
            self.state(),
            self.model(),
            self.adapter(),
            self.adapter_config(),
            self.metrics(),
            self.evaluations(),
            self.config(),
            self.curves(),
            self.attention(),
            self.recall(),
            self.summary(),
        ]
    }
}
