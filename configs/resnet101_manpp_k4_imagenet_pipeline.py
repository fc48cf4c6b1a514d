_base_ = './resnet101_manpp_k4_imagenet.py'

# One block a process: tools/dist_train.sh configs/resnet101_manpp_k4_imagenet_pipeline.py 4, or a multiple of 4 for replicas.
runner_type = 'mmman.PipelineRunner'
