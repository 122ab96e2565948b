"""The model: channels as physics, patches in 2D and 3D, masks, and the masked autoencoder itself.

    spec            shape and objective as plain data
    channels        a channel's physics -> coefficients of its filters
    patch_embed     pixels of any channels -> tokens, and tokens -> pixels
    positions       physical coordinates -> sines and cosines
    masking         which patches are shown and asked for
    attention       which kernel, and the cross-attention of mode fast
    vit             the encoder
    decoder         the decoders of modes exact and fast
    targets, mae    the objective, and the paper on one page
    contract        physical values -> model units
    pretrained      an encoder in use: embed, features
    encoder_folder  an encoder on disk

Everything here runs without pydantic, rasterio or pydicom.
"""
